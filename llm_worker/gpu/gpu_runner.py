"""Runs steps on a GPU as CUDA graphs: short ones whole, long ones as what lies between two attentions.

Graphs read and write the static buffers of `InputEmbedBuffer` and this runner only, and share one memory pool; only one
runs at a time. A step is run in the smallest bucket that holds its tokens; rows behind them have slot -1. Each bucket
has its graphs twice, as far as they differ: for steps with media, whose deepstack rows are added, and for text alone.

Shapes: M tokens at most, C hidden size, H query heads, D head dim.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from llm_worker.engine.kv_cache import KvCache
from llm_worker.gpu.fused_decoder import FusedDecoder
from llm_worker.gpu.prefill_attention import CausalVarlen
from llm_worker.gpu.step_attention import StepAttention
from llm_worker.gpu.step_tables import StepTables, Tiles
from llm_worker.gpu.tile_attention import tile_attention
from llm_worker.models.decoder import StepInputs, TextDecoder

_log = logging.getLogger(__name__)

Work: TypeAlias = Callable[[], None]
# What it returns does the work, too.
Capture: TypeAlias = Callable[[Work], Work]
_MULTIPLE = 8
# Up to here launches take longer than what they launch: attention is in the graph, too. Above, its own kernels for
# long prompts are worth their launches.
_MAX_SHORT_STEP = 512
_TOKENS_A_TILE = 16


def token_ladder(max_tokens: int) -> list[int]:
    """Token counts in ascending order up to `max_tokens`: powers of two and seven sizes between two of them.

    A step pays for 12.5 % more tokens than it has at most, and for 6 % on average.
    """
    sizes = set(range(_MULTIPLE, 8 * _MULTIPLE, _MULTIPLE))
    octave = 8 * _MULTIPLE
    while octave < max_tokens:
        sizes.update(range(octave, 2 * octave, octave // 8))
        octave *= 2
    return [*sorted(size for size in sizes if size < max_tokens), max_tokens]


def decode_ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes: powers of two up to 8, then every eighth."""
    sizes = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*sizes, *range(8, max_num_seqs, 8), max_num_seqs]


class GpuRunner:
    """A `Runner`. Not thread-safe: one step at a time."""

    def __init__(
        self,
        decoder: TextDecoder,
        kv_cache: KvCache,
        buffer: InputEmbedBuffer,
        max_num_seqs: int,
        max_model_len: int,
        causal: CausalVarlen,
        capture: Capture | None = None,
        max_short_step: int = _MAX_SHORT_STEP,
    ) -> None:
        """Captures all graphs, which takes a while.

        Args:
            causal: attention of long steps.
            capture: None for CUDA graphs.
            max_short_step: tokens of a step that runs as one graph.
        """
        config, device = decoder.config, decoder.device
        self._fused = FusedDecoder(decoder)
        self._kv_cache, self._causal, self._device = kv_cache, causal, device
        self._num_deepstack, self._max_num_seqs = config.num_deepstack, max_num_seqs
        max_tokens = len(buffer.slot_mapping_M)
        self._buffer = buffer
        heads = (max_tokens, config.num_attention_heads, config.head_dim)
        # Padding rows of attention are never written: they stay zero.
        self._q_MHD = torch.zeros(heads, dtype=decoder.dtype, device=device)
        self._attended_MHD = torch.zeros_like(self._q_MHD)
        self._hidden_MC = torch.zeros_like(buffer.embeds_MC)
        self._cos_sin_M2F = torch.zeros((max_tokens, 2, config.head_dim // 2), dtype=decoder.dtype, device=device)
        sizes = token_ladder(max_tokens)
        short = [size for size in sizes if size <= max_short_step]
        num_kv_heads = config.num_key_value_heads
        # A tile more for each sequence, as its last is rarely full.
        max_chunk_tiles = max_short_step // _TOKENS_A_TILE + max_num_seqs
        self._tables = StepTables(
            Tiles(1, max_num_seqs, num_kv_heads, device),
            Tiles(_TOKENS_A_TILE, max_chunk_tiles, num_kv_heads, device),
            max_num_seqs,
            kv_cache.blocks_for(max_model_len),
            kv_cache.block_size,
            device,
        )
        started = time.monotonic()
        capture = capture if capture is not None else _CudaGraphs(device)
        # The largest first: smaller ones find their memory in the pool.
        with torch.inference_mode():
            self._long = {size: self._pieces(size, capture) for size in sizes[::-1] if size not in short}
            self._short = {size: self._variants(size, capture) for size in short[::-1]}
            self._decode = {size: capture(self._decode_step(size)) for size in decode_ladder(max_num_seqs)[::-1]}
        _log.info(
            "CUDA graphs in %.1f s: decoding of %d batch sizes up to %d, other steps of %d sizes up to %d tokens",
            time.monotonic() - started,
            len(self._decode),
            max_num_seqs,
            len(sizes),
            max_tokens,
        )

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the last norm, [T, C]; valid until the next step."""
        num_tokens, sequences = len(inputs.slot_mapping_T), inputs.sequences
        has_media = inputs.deepstack_NTC is not None
        if num_tokens == len(sequences) and num_tokens <= self._max_num_seqs and not has_media:
            size = _bucket(self._decode, num_tokens)
            self._tables.write(sequences, self._tables.singles.splits(size), None)
            self._decode[size]()
        elif num_tokens <= max(self._short, default=0):
            size = _bucket(self._short, num_tokens)
            self._tables.write(sequences, *self._short_splits(size))
            self._short[size][has_media]()
        else:
            pieces = self._long[_bucket(self._long, num_tokens)][has_media]
            attention = StepAttention(sequences, self._tables, self._causal, self._device)
            pieces[0]()
            for piece, (k_cache, v_cache) in zip(pieces[1:], self._kv_cache.layers, strict=True):
                attention(self._q_MHD, k_cache, v_cache, self._attended_MHD)
                piece()
        return self._hidden_MC[:num_tokens]

    def _short_splits(self, size: int) -> tuple[int, int]:
        """Of single tokens and of chunks, at most, in short steps of that size: such as fill a GPU if all are such."""
        tables = self._tables
        num_singles, num_chunks = min(size, self._max_num_seqs), -(-size // _TOKENS_A_TILE)
        return tables.singles.splits(num_singles), tables.chunks.splits(num_chunks)

    def _variants(self, size: int, capture: Capture) -> dict[bool, Work]:
        """Without and with media."""
        return {media: capture(self._short_step(size, media=media)) for media in (False, True)}

    def _pieces(self, size: int, capture: Capture) -> dict[bool, list[Work]]:
        """Without and with media; those that do not differ are captured once."""
        num_pieces = len(self._fused.layers) + 1
        text = [capture(self._piece(index, size, media=False)) for index in range(num_pieces)]
        deep = range(1, self._num_deepstack + 1)
        media = [
            capture(self._piece(index, size, media=True)) if index in deep else text[index]
            for index in range(num_pieces)
        ]
        return {False: text, True: media}

    def _decode_step(self, size: int) -> Work:
        tables = self._tables
        splits = tables.singles.splits(size)
        q_THD, attended_THD = self._q_MHD[:size], self._attended_MHD[:size]

        def attend(k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor) -> None:
            tile_attention(q_THD, k_cache_SKD, v_cache_SKD, tables, tables.singles, size, splits, attended_THD)

        return self._whole_step(size, attend, media=False)

    def _short_step(self, size: int, *, media: bool) -> Work:
        tables = self._tables
        single_splits, chunk_splits = self._short_splits(size)
        num_singles, num_chunks = min(size, self._max_num_seqs), -(-size // _TOKENS_A_TILE) + self._max_num_seqs
        q_THD, attended_THD = self._q_MHD[:size], self._attended_MHD[:size]

        def attend(k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor) -> None:
            for tiles, num_tiles, splits in (
                (tables.singles, num_singles, single_splits),
                (tables.chunks, num_chunks, chunk_splits),
            ):
                tile_attention(q_THD, k_cache_SKD, v_cache_SKD, tables, tiles, num_tiles, splits, attended_THD)

        return self._whole_step(size, attend, media=media)

    def _whole_step(self, size: int, attend: Callable[[torch.Tensor, torch.Tensor], None], *, media: bool) -> Work:
        """All pieces and the attention between them."""
        pieces = [self._piece(index, size, media=media) for index in range(len(self._fused.layers) + 1)]

        def run() -> None:
            pieces[0]()
            for piece, (k_cache, v_cache) in zip(pieces[1:], self._kv_cache.layers, strict=True):
                attend(k_cache, v_cache)
                piece()

        return run

    def _piece(self, index: int, size: int, *, media: bool) -> Work:
        """What lies behind attention `index - 1` and in front of attention `index`."""
        layers = self._fused.layers
        x_TC, slots_T = self._buffer.embeds_MC[:size], self._buffer.slot_mapping_M[:size]
        cos_sin_T2F, q_THD = self._cos_sin_M2F[:size], self._q_MHD[:size]
        deepstack = media and 1 <= index <= self._num_deepstack
        added = (self._buffer.deepstack_NMC[index - 1, :size],) if deepstack else ()

        def run() -> None:
            if index == 0:
                self._fused.write_rope_table(self._buffer.positions_3M[:, :size], cos_sin_T2F)
            else:
                layers[index - 1].after_attention(x_TC, self._attended_MHD[:size].flatten(1))
            if index == len(layers):
                self._fused.last_norm(x_TC, added, self._hidden_MC[:size])
            else:
                k_cache, v_cache = self._kv_cache.layers[index]
                layers[index].before_attention(x_TC, added, cos_sin_T2F, slots_T, k_cache, v_cache, q_THD)

        return run


def _bucket(sizes: dict[int, Any], num_tokens: int) -> int:
    return min(size for size in sizes if size >= num_tokens)


class _CudaGraphs:
    """Captures into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        work()  # compiles kernels, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks for events meanwhile, which any other mode takes for an error of ours.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
