"""The static input buffers of a step. The decoder reads only these; text embeddings and media rows are written in.

Shapes: M max_num_batched_tokens, T tokens of the step, C hidden size, N deepstack layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many

import torch

from llm_worker.engine.kv_cache import KvCache
from llm_worker.engine.scheduler import Chunk
from llm_worker.models.decoder import StepInputs, TextDecoder
from llm_worker.models.paged_attention import SequenceSlice


class InputEmbedBuffer:
    """Buffers of fixed size and address, written anew each step from their first row on."""

    def __init__(self, decoder: TextDecoder, max_num_batched_tokens: int) -> None:
        config, device = decoder.config, decoder.device
        hidden = (max_num_batched_tokens, config.hidden_size)
        self._decoder = decoder
        self._embeds_MC = torch.zeros(hidden, device=device, dtype=decoder.dtype)
        self._deepstack_NMC = torch.zeros(config.num_deepstack, *hidden, device=device, dtype=decoder.dtype)
        self._positions_3M = torch.zeros(3, max_num_batched_tokens, device=device, dtype=torch.int64)
        self._slot_mapping_M = torch.zeros(max_num_batched_tokens, device=device, dtype=torch.int64)

    def write(self, chunks: Many[Chunk], kv_cache: KvCache) -> tuple[StepInputs, list[tuple[Chunk, Exception]]]:
        """Fills the buffers with the step's tokens.

        Returns:
            The inputs, and the chunks whose media rows could not be landed with the reason: their share of the step
            holds placeholders, so what comes out for them must not be used.
        """
        failed: list[tuple[Chunk, Exception]] = []
        slices: list[SequenceSlice] = []
        has_media = False
        start = 0
        for chunk in chunks:
            rows = slice(start, start + chunk.length)
            sequence = chunk.sequence
            slots = kv_cache.slots(sequence.blocks, chunk.stop)
            token_ids = torch.tensor(sequence.token_ids[chunk.start : chunk.stop], device=self._embeds_MC.device)
            self._embeds_MC[rows] = self._decoder.embed(token_ids)
            self._deepstack_NMC[:, rows] = 0
            self._positions_3M[:, rows] = sequence.positions(chunk.start, chunk.stop)
            self._slot_mapping_M[rows] = slots[chunk.start :]
            slices.append(SequenceSlice(start, chunk.length, chunk.stop, slots))
            try:
                has_media |= self._land(chunk, start)
            except Exception as error:  # whatever happens to one request's rows must not reach the others
                failed.append((chunk, error))
            start += chunk.length
        inputs = StepInputs(
            embeds_TC=self._embeds_MC[:start],
            deepstack_NTC=self._deepstack_NMC[:, :start] if has_media and len(self._deepstack_NMC) else None,
            positions_3T=self._positions_3M[:, :start],
            slot_mapping_T=self._slot_mapping_M[:start],
            sequences=slices,
        )
        return inputs, failed

    def _land(self, chunk: Chunk, first_row: int) -> bool:
        """Copies the chunk's part of every media item to its place; returns whether there was any."""
        spans = chunk.sequence.spans_in(chunk.start, chunk.stop)
        begin = time.perf_counter()
        for span in spans:
            start, stop = max(span.start, chunk.start), min(span.start + span.length, chunk.stop)
            rows = slice(first_row + start - chunk.start, first_row + stop - chunk.start)
            deepstack = self._deepstack_NMC[:, rows] if len(self._deepstack_NMC) else None
            item = chunk.sequence.rows[span.item_index]
            item.copy_to(self._embeds_MC[rows], deepstack, span.first_row + start - span.start)
        chunk.sequence.land_s += time.perf_counter() - begin
        return bool(spans)
