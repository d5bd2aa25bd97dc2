"""The static input buffers of a step. The decoder reads only these; text embeddings and media rows are written in.

Shapes: M max_num_batched_tokens, T tokens of the step, C hidden size, N deepstack layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from itertools import accumulate

import torch

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

    def write(self, chunks: Many[Chunk]) -> tuple[StepInputs, dict[Chunk, Exception]]:
        """Fills the buffers with the step's tokens.

        Returns:
            The inputs, and the chunks whose media rows could not be landed with the reason: their share of the step
            holds placeholders, so what comes out for them must not be used.
        """
        token_ids = [each for chunk in chunks for each in chunk.sequence.token_ids[chunk.start : chunk.stop]]
        num_tokens = len(token_ids)
        self._embeds_MC[:num_tokens] = self._decoder.embed(torch.tensor(token_ids, device=self._embeds_MC.device))
        positions = [chunk.sequence.positions(chunk.start, chunk.stop) for chunk in chunks]
        self._positions_3M[:, :num_tokens] = torch.cat(positions, dim=1)
        slots = [chunk.sequence.blocks.slots[chunk.start : chunk.stop] for chunk in chunks]
        self._slot_mapping_M[:num_tokens] = torch.cat(slots)

        starts = [
            stop - chunk.length for chunk, stop in zip(chunks, accumulate(each.length for each in chunks), strict=True)
        ]
        has_media = any(chunk.sequence.spans_in(chunk.start, chunk.stop) for chunk in chunks)
        failed: dict[Chunk, Exception] = {}
        if has_media:
            self._deepstack_NMC[:, :num_tokens] = 0
            for chunk, start in zip(chunks, starts, strict=True):
                try:
                    self._land(chunk, start)
                except Exception as error:  # whatever happens to one request's rows must not reach the others
                    failed[chunk] = error
        inputs = StepInputs(
            embeds_TC=self._embeds_MC[:num_tokens],
            deepstack_NTC=self._deepstack_NMC[:, :num_tokens] if has_media and len(self._deepstack_NMC) else None,
            positions_3T=self._positions_3M[:, :num_tokens],
            slot_mapping_T=self._slot_mapping_M[:num_tokens],
            sequences=[
                SequenceSlice(start, chunk.length, chunk.stop, chunk.sequence.blocks.slots[: chunk.stop])
                for chunk, start in zip(chunks, starts, strict=True)
            ],
        )
        return inputs, failed

    def _land(self, chunk: Chunk, first_row: int) -> None:
        """Copies the chunk's part of every media item to its place."""
        begin = time.perf_counter()
        for span in chunk.sequence.spans_in(chunk.start, chunk.stop):
            start, stop = max(span.start, chunk.start), min(span.start + span.length, chunk.stop)
            rows = slice(first_row + start - chunk.start, first_row + stop - chunk.start)
            deepstack = self._deepstack_NMC[:, rows] if len(self._deepstack_NMC) else None
            item = chunk.sequence.rows[span.item_index]
            item.copy_to(self._embeds_MC[rows], deepstack, span.first_row + start - span.start)
        chunk.sequence.land_s += time.perf_counter() - begin
