"""The static input buffers of a step. The decoder reads only these; text embeddings and media rows are written in.

Shapes: M max_num_batched_tokens, T tokens of the step, C hidden size, N deepstack layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from embedding_transport.received_rows import copy_rows
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.scheduler import Chunk
from llm_worker.engine.staging_buffer import PinnedStagingBuffer
from llm_worker.models.decoder import StepInputs, TextDecoder
from llm_worker.models.paged_attention import SequenceSlice


@dataclass(frozen=True)
class Landing:
    """Rows of a media item from `first_row` on, for tokens [start, stop) of the step."""

    rows: EmbeddingRows
    first_row: int
    start: int
    stop: int


class InputEmbedBuffer:
    """Buffers of fixed size and address, written anew each step from their first row on.

    embeds_MC, deepstack_NMC, positions_3M, slot_mapping_M: of which StepInputs has the first rows.
    integers: token ids, positions along three axes and slots, [5, M] int64: one copy a step.
    landed: what the last step landed, by chunk.
    """

    def __init__(self, decoder: TextDecoder, max_num_batched_tokens: int) -> None:
        config, device = decoder.config, decoder.device
        hidden = (max_num_batched_tokens, config.hidden_size)
        self._decoder = decoder
        self.embeds_MC = torch.zeros(hidden, device=device, dtype=decoder.dtype)
        self.deepstack_NMC = torch.zeros(config.num_deepstack, *hidden, device=device, dtype=decoder.dtype)
        self.landed: dict[Chunk, list[Landing]] = {}
        self.integers = PinnedStagingBuffer((5, max_num_batched_tokens), torch.int64, device)
        self._token_ids_M = self.integers.tensor[0]
        self.positions_3M, self.slot_mapping_M = self.integers.tensor[1:4], self.integers.tensor[4]
        if device.type == "cuda":
            # Compiles what lands rows: the first picture would wait for it.
            row_1W = self.embeds_MC.new_zeros(1, config.hidden_size * (1 + config.num_deepstack))
            copy_rows(row_1W, *self.places(0, 1), 0)

    def write(
        self, chunks: Many[Chunk], chosen_B: torch.Tensor | None = None
    ) -> tuple[StepInputs, dict[Chunk, Exception]]:
        """Fills the buffers with the step's tokens. Slots behind them are -1.

        Args:
            chosen_B: what the step in front chooses; see `Sequence.token_ids`.

        Returns:
            The inputs, and the chunks whose media rows could not be landed with the reason: their share of the step
            holds placeholders, so what comes out for them must not be used.
        """
        stops = list(accumulate(chunk.length for chunk in chunks))
        starts, num_tokens = [0, *stops[:-1]], stops[-1]
        self._write_integers(chunks, starts)
        sequences = [
            SequenceSlice(start, chunk.length, chunk.stop, chunk.sequence.blocks)
            for chunk, start in zip(chunks, starts, strict=True)
        ]
        has_media = any(chunk.sequence.spans_in(chunk.start, chunk.stop) for chunk in chunks)
        inputs = self.copy_to_device(num_tokens, sequences, has_media and len(self.deepstack_NMC) > 0, chosen_B)

        failed: dict[Chunk, Exception] = {}
        self.landed = {}
        if has_media:
            for chunk, start in zip(chunks, starts, strict=True):
                try:
                    self.landed[chunk] = self._land_chunk(chunk, start)
                except Exception as error:  # whatever happens to one request's rows must not reach the others
                    failed[chunk] = error
        return inputs, failed

    def copy_to_device(
        self,
        num_tokens: int,
        sequences: Many[SequenceSlice],
        with_deepstack: bool,
        chosen_B: torch.Tensor | None = None,
    ) -> StepInputs:
        """Fills the buffers from what `integers` has on the host; media rows are still to be landed.

        Args:
            with_deepstack: whether deepstack rows are to be landed.
            chosen_B: see `write`.
        """
        self.integers.host[4, num_tokens:] = -1
        self.integers.copy_to_device()
        embeds_TC, token_ids_T = self.embeds_MC[:num_tokens], self._token_ids_M[:num_tokens]
        if chosen_B is not None and len(chosen_B):
            # None is below 0 afterwards: a sequence that is about to fail has no token, and its step runs all the same.
            chosen_T = chosen_B.index_select(0, token_ids_T.bitwise_not().clamp_min_(0))
            token_ids_T = torch.where(token_ids_T < 0, chosen_T, token_ids_T).clamp_min_(0)
        self._decoder.embed(token_ids_T, embeds_TC)
        if with_deepstack:
            self.deepstack_NMC[:, :num_tokens] = 0
        return StepInputs(
            embeds_TC=embeds_TC,
            deepstack_NTC=self.deepstack_NMC[:, :num_tokens] if with_deepstack else None,
            positions_3T=self.positions_3M[:, :num_tokens],
            slot_mapping_T=self.slot_mapping_M[:num_tokens],
            sequences=sequences,
        )

    def land(self, landing: Landing) -> None:
        """Copies the rows to their tokens; see EmbeddingRows.copy_to."""
        main_TC, deepstack_NTC = self.places(landing.start, landing.stop)
        landing.rows.copy_to(main_TC, deepstack_NTC, landing.first_row)

    def places(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where media rows of these tokens go: main embedding, and deepstack rows where the model has any."""
        tokens = slice(start, stop)
        return self.embeds_MC[tokens], self.deepstack_NMC[:, tokens] if len(self.deepstack_NMC) else None

    def _write_integers(self, chunks: Many[Chunk], starts: list[int]) -> None:
        integers_5M = self.integers.writable()
        # Lists for tokens that decode, as an array costs more than the few numbers of one of them.
        rows: list[int] = []
        decoding: list[tuple[int, int, int, int, int]] = []
        for chunk, row in zip(chunks, starts, strict=True):
            sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
            if sequence.is_decoding and chunk.length == 1:
                position = sequence.generated_position(start)
                slot = int(sequence.blocks.slots.numpy()[start])
                rows.append(row)
                decoding.append((sequence.token_ids[start], position, position, position, slot))
            else:
                integers_5T = integers_5M[:, row : row + chunk.length]
                integers_5T[0] = sequence.token_ids[start:stop]
                integers_5T[1:4] = sequence.positions(start, stop).numpy()
                integers_5T[4] = sequence.blocks.slots[start:stop].numpy()
        if decoding:
            integers_5M[:, rows] = np.array(decoding).T

    def _land_chunk(self, chunk: Chunk, first_token: int) -> list[Landing]:
        """Copies the chunk's part of every media item to its place."""
        begin = time.perf_counter()
        landings = []
        for span in chunk.sequence.spans_in(chunk.start, chunk.stop):
            start, stop = max(span.start, chunk.start), min(span.start + span.length, chunk.stop)
            offset = first_token - chunk.start
            rows = chunk.sequence.rows[span.item_index]
            landings.append(Landing(rows, span.first_row + start - span.start, offset + start, offset + stop))
            self.land(landings[-1])
        chunk.sequence.land_s += time.perf_counter() - begin
        return landings
