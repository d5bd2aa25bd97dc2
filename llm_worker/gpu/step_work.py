"""The work of a step of a given size, over fixed memory, so that it can be captured.

Shapes: M tokens at most, C hidden size, H query heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from vitrine_vlm.gpu_kernels.auxiliary_stream import AuxiliaryStream
from vitrine_vlm.gpu_kernels.graph_capture import Work
from vitrine_vlm.llm_worker.engine.capture_sizes import decode_capture_sizes, token_capture_sizes
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.gpu.fused_decoder import FusedDecoder
from vitrine_vlm.llm_worker.gpu.step_tables import StepTables, Tiles
from vitrine_vlm.llm_worker.gpu.tile_attention import tile_attention
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.kv_slots import KvScales

_TOKENS_A_TILE = 16
# Splits of single tokens beside chunks: with 16 tokens they fill a GPU. There is memory for these splits of all tokens.
_SINGLE_SPLITS = 8


class _Part(NamedTuple):
    """The tiles of a part of a step's tokens; see `tile_attention`."""

    tiles: Tiles
    max_tiles: int
    most_splits: int


class StepWork:
    """Makes the functions that compute steps.

    q_MHD, attended_MHD: queries of a layer, and the result of its attention. hidden_MC: a step's result.
    tables: of the step's sequences.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        kv_cache: KvCache,
        buffer: InputEmbedBuffer,
        max_num_seqs: int,
        max_model_len: int,
        max_short_step: int,
    ) -> None:
        config, device = decoder.config, decoder.device
        sizes = {*token_capture_sizes(len(buffer.slot_mapping_M)), *decode_capture_sizes(max_num_seqs)}
        self._fused = FusedDecoder(decoder, tuple(sorted(sizes)))
        self._kv_cache, self._buffer = kv_cache, buffer
        self._num_deepstack, self._max_num_seqs = config.num_deepstack, max_num_seqs
        heads = (len(buffer.slot_mapping_M), config.num_attention_heads, config.head_dim)
        # Padding holds values of earlier steps, which is harmless, as every token is computed by itself.
        self.q_MHD = torch.zeros(heads, dtype=decoder.dtype, device=device)
        self.attended_MHD = torch.zeros_like(self.q_MHD)
        self.hidden_MC = torch.zeros_like(buffer.embeds_MC)
        self._auxiliary_stream = AuxiliaryStream(device)
        self._cos_sin_M2F = torch.zeros((heads[0], 2, config.head_dim // 2), dtype=decoder.dtype, device=device)
        num_kv_heads = config.num_key_value_heads
        self.tables = StepTables(
            Tiles(1, max_num_seqs, num_kv_heads, device),
            # One more for each sequence, as its last tile is rarely full.
            Tiles(_TOKENS_A_TILE, max_short_step // _TOKENS_A_TILE + max_num_seqs, num_kv_heads, device),
            max_num_seqs,
            kv_cache.blocks_for(max_model_len),
            kv_cache.block_size,
            device,
        )

    def decode_splits(self, size: int) -> int:
        """Most splits of single tokens in decode steps of this size."""
        return self.tables.singles.splits(size)

    def short_splits(self, size: int) -> tuple[int, int]:
        """Most splits of single tokens and of chunks in short steps of this size; those of chunks fill a GPU alone."""
        return _SINGLE_SPLITS, self.tables.chunks.splits(-(-size // _TOKENS_A_TILE))

    @property
    def long_splits(self) -> int:
        """Most splits of single tokens in long steps, where nothing runs beside them, however few they are."""
        return self.tables.singles.splits(1)

    def decode_step(self, size: int) -> Work:
        """A step of `size` sequences with one text token each."""
        singles = _Part(self.tables.singles, size, self.decode_splits(size))
        return self._whole_step(size, singles, None, media=False)

    def short_step(self, size: int, *, media: bool) -> Work:
        """A step of any sequences with `size` tokens together."""
        single_splits, chunk_splits = self.short_splits(size)
        num_singles, num_chunks = min(size, self._max_num_seqs), -(-size // _TOKENS_A_TILE) + self._max_num_seqs
        singles = _Part(self.tables.singles, num_singles, single_splits)
        chunks = _Part(self.tables.chunks, num_chunks, chunk_splits)
        return self._whole_step(size, singles, chunks, media=media)

    def single_attention(self, layer: int) -> Work:
        """Attention of the sequences that decode in a long step, which come first in it."""
        singles = _Part(self.tables.singles, self._max_num_seqs, self.long_splits)
        return partial(self._attend, self._max_num_seqs, singles, layer)

    @property
    def num_pieces(self) -> int:
        return len(self._fused.layers) + 1

    def kv_scales(self, layer: int) -> KvScales:
        """The scales of a layer's keys and values in a cache in FP8."""
        return self._fused.layers[layer].kv_scales

    def has_media_variant(self, index: int) -> bool:
        """Whether a piece differs in steps with media: then it adds a layer of deepstack embeddings."""
        return 1 <= index <= self._num_deepstack

    def piece(self, index: int, size: int, *, media: bool) -> Work:
        """The work between attention `index - 1` and attention `index`."""
        layers = self._fused.layers
        x_TC, slots_T = self._buffer.embeds_MC[:size], self._buffer.slot_mapping_M[:size]
        cos_sin_T2F, q_THD = self._cos_sin_M2F[:size], self.q_MHD[:size]
        deepstack = media and self.has_media_variant(index)
        added = (self._buffer.deepstack_NMC[index - 1, :size],) if deepstack else ()

        def run() -> None:
            pending: tuple[torch.Tensor, ...] = ()
            if index == 0:
                self._fused.write_rope_table(self._buffer.positions_3M[:, :size], cos_sin_T2F)
            else:
                pending = layers[index - 1].after_attention(x_TC, self.attended_MHD[:size].flatten(1))
            if index == len(layers):
                self._fused.last_norm(x_TC, (*pending, *added), self.hidden_MC[:size])
            else:
                k_cache, v_cache = self._kv_cache.layers[index]
                layers[index].before_attention(x_TC, (*pending, *added), cos_sin_T2F, slots_T, k_cache, v_cache, q_THD)

        return run

    def _whole_step(self, size: int, singles: _Part, chunks: _Part | None, *, media: bool) -> Work:
        """All pieces, with the attention between them."""
        pieces = [self.piece(index, size, media=media) for index in range(self.num_pieces)]
        attend = partial(self._attend, size)

        def run() -> None:
            pieces[0]()
            for layer, piece in enumerate(pieces[1:]):
                if chunks is None:
                    attend(singles, layer)
                else:
                    self._auxiliary_stream.run_both(partial(attend, singles, layer), partial(attend, chunks, layer))
                piece()

        return run

    def _attend(self, size: int, part: _Part, layer: int) -> None:
        """Attention of a part of a step's first tokens, up to `size` of them."""
        k_cache, v_cache = self._kv_cache.layers[layer]
        q_THD, attended_THD = self.q_MHD[:size], self.attended_MHD[:size]
        tile_attention(q_THD, k_cache, v_cache, self.tables, *part, attended_THD, self.kv_scales(layer))
