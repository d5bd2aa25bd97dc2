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
        # Token ids, positions along three axes, slots: written on the host, and brought over by one copy.
        integers = (5, max_num_batched_tokens)
        self._integers_5M = torch.zeros(integers, device=device, dtype=torch.int64)
        self._host_5M = torch.zeros(integers, dtype=torch.int64, pin_memory=device.type == "cuda")

    def write(self, chunks: Many[Chunk]) -> tuple[StepInputs, dict[Chunk, Exception]]:
        """Fills the buffers with the step's tokens.

        Returns:
            The inputs, and the chunks whose media rows could not be landed with the reason: their share of the step
            holds placeholders, so what comes out for them must not be used.
        """
        token_ids = [each for chunk in chunks for each in chunk.sequence.token_ids[chunk.start : chunk.stop]]
        num_tokens = len(token_ids)
        host_5T, integers_5T = self._host_5M[:, :num_tokens], self._integers_5M[:, :num_tokens]
        host_5T[0] = torch.tensor(token_ids)
        positions = [chunk.sequence.positions(chunk.start, chunk.stop) for chunk in chunks]
        torch.cat(positions, dim=1, out=host_5T[1:4])
        torch.cat([chunk.sequence.blocks.slots[chunk.start : chunk.stop] for chunk in chunks], out=host_5T[4])
        integers_5T.copy_(host_5T)  # blocking: the host's numbers are written anew in the next step
        self._embeds_MC[:num_tokens] = self._decoder.embed(integers_5T[0])

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
            positions_3T=integers_5T[1:4],
            slot_mapping_T=integers_5T[4],
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
