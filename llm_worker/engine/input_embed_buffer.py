"""The static input buffers of a step: text and media embeddings are written to them, and the decoder reads only them.

Shapes: M max_num_batched_tokens, T tokens of the step, S max_num_seqs, P tokens read from the token pool, B sampled
sequences, C hidden size, N deepstack layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vitrine_vlm.embedding_transport.receiving.received_rows import copy_rows
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.prompt_logprobs import ScoredTokens
from vitrine_vlm.llm_worker.engine.staging_buffer import PinnedStagingBuffer
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder
from vitrine_vlm.llm_worker.models.paged_attention import SequenceSlice
from vitrine_vlm.types import EmbeddingRows

# Token ids, positions along three axes, and slots.
_NUM_INTEGERS = 5


@dataclass(frozen=True)
class Landing:
    """A media item's embeddings from row `first_row` on, for tokens [start, stop) of the step."""

    embeddings: EmbeddingRows
    first_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class PreparedStep:
    """A step whose inputs are in the buffers.

    sampled_tokens: the tokens of the step that need logits, one of each chunk that samples.
    landings: the embeddings that were landed, by chunk.
    scored: tokens whose prompt's next tokens' log-probabilities are wanted, see `prompt_logprobs.py`.
    failed: chunks whose media embeddings could not be landed, with the reason: their tokens have the embeddings of
        placeholders, so their results must not be used.
    """

    inputs: StepInputs
    sampled_tokens: list[int]
    landings: dict[Chunk, list[Landing]] = field(default_factory=dict)
    failed: dict[Chunk, Exception] = field(default_factory=dict)
    scored: list[ScoredTokens] = field(default_factory=list)


class InputEmbedBuffer:
    """Buffers of fixed size and address, overwritten by each step from their first row on.

    embeds_MC, deepstack_NMC, positions_3M, slot_mapping_M: StepInputs has the step's part of them.
    sampled_tokens_S, sampled_pool_rows_S: PreparedStep.sampled_tokens and the token pool's rows of their requests, on
        the device.
    """

    def __init__(
        self, decoder: TextDecoder, max_num_batched_tokens: int, max_num_seqs: int, token_pool: TokenPool
    ) -> None:
        config, device = decoder.config, decoder.device
        hidden = (max_num_batched_tokens, config.hidden_size)
        self._decoder = decoder
        self._token_pool = token_pool
        self.embeds_MC = torch.zeros(hidden, device=device, dtype=decoder.dtype)
        self.deepstack_NMC = torch.zeros(config.num_deepstack, *hidden, device=device, dtype=decoder.dtype)
        # All integers of a step are in one tensor, as each copy to a GPU costs a launch.
        num_integers = _NUM_INTEGERS * max_num_batched_tokens
        self._staged = PinnedStagingBuffer((num_integers + 4 * max_num_seqs,), torch.int64, device)
        integers_5M, indices_4S = _views(self._staged.tensor, num_integers)
        self._host_5M, self._host_4S = _views(self._staged.host.numpy(), num_integers)
        self._host_5M[4] = -1
        self._num_staged = 0  # tokens that may have slots on the host
        self._token_ids_M, self.positions_3M, self.slot_mapping_M = integers_5M[0], integers_5M[1:4], integers_5M[4]
        self._pooled_tokens_S, self._pooled_rows_S, self.sampled_tokens_S, self.sampled_pool_rows_S = indices_4S
        if device.type == "cuda":
            # Compiles the kernel that lands embeddings, for which the first image would otherwise wait.
            row_1W = self.embeds_MC.new_zeros(1, config.hidden_size * (1 + config.num_deepstack))
            copy_rows(row_1W, *self.places(0, 1), 0)

    def write(self, chunks: Sequence[Chunk], scored: Iterable[ScoredTokens] = ()) -> PreparedStep:
        """Fills the buffers with the step's tokens. Slots behind them are -1."""
        stops = list(accumulate(chunk.length for chunk in chunks))
        starts, num_tokens = [0, *stops[:-1]], stops[-1]
        sampled = [stop - 1 for chunk, stop in zip(chunks, stops, strict=True) if chunk.samples]
        num_pooled = self._write_integers(chunks, starts, sampled)
        sequences = [
            SequenceSlice(start, chunk.length, chunk.stop, chunk.request.table)
            for chunk, start in zip(chunks, starts, strict=True)
        ]
        has_media = any(chunk.request.spans_in(chunk.start, chunk.stop) for chunk in chunks)
        inputs = self.copy_to_device(num_tokens, sequences, has_media and len(self.deepstack_NMC) > 0, num_pooled)

        prepared = PreparedStep(inputs, sampled, scored=list(scored))
        if has_media:
            for chunk, start in zip(chunks, starts, strict=True):
                try:
                    prepared.landings[chunk] = self._land_chunk(chunk, start)
                except Exception as error:  # of one request, and must not fail the others
                    prepared.failed[chunk] = error
        return prepared

    def stage(self, integers_5T: npt.NDArray[np.int64], sampled_tokens: list[int]) -> None:
        """Writes the integers of another rank's step to the host's memory.

        Args:
            integers_5T: `staged_integers` of that rank.
        """
        num_tokens = integers_5T.shape[1]
        self._begin(num_tokens)
        self._host_5M[:, :num_tokens] = integers_5T
        self._host_4S[2, : len(sampled_tokens)] = sampled_tokens

    def staged_integers(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Token ids, positions and slots of the step, [5, T], as the host has them."""
        integers_5T: npt.NDArray[np.int64] = self._host_5M[:, :num_tokens]
        return integers_5T

    def copy_to_device(
        self, num_tokens: int, sequences: Sequence[SequenceSlice], with_deepstack: bool, num_pooled: int = 0
    ) -> StepInputs:
        """Fills the buffers from the integers that are staged on the host; media embeddings are landed afterwards.

        Args:
            with_deepstack: whether deepstack rows are to be landed.
            num_pooled: tokens of the step that are read from the token pool.
        """
        self._host_5M[4, num_tokens : self._num_staged] = -1
        self._num_staged = num_tokens
        self._staged.copy_to_device()
        embeds_TC, token_ids_T = self.embeds_MC[:num_tokens], self._token_ids_M[:num_tokens]
        if num_pooled:
            pooled_P = self._token_pool.tokens_R.index_select(0, self._pooled_rows_S[:num_pooled])
            if num_pooled == num_tokens:
                token_ids_T = pooled_P
            else:
                token_ids_T.index_copy_(0, self._pooled_tokens_S[:num_pooled], pooled_P)
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
        """Copies the embeddings to their tokens; see EmbeddingRows.copy_to."""
        main_TC, deepstack_NTC = self.places(landing.start, landing.stop)
        landing.embeddings.copy_to(main_TC, deepstack_NTC, landing.first_row)

    def places(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of the buffers at these tokens: embeddings, and deepstack where the model has it."""
        tokens = slice(start, stop)
        return self.embeds_MC[tokens], self.deepstack_NMC[:, tokens] if len(self.deepstack_NMC) else None

    def _begin(self, num_tokens: int) -> None:
        """Waits until the host's memory may be written: the last step's copy must have read it."""
        self._staged.wait()
        # An earlier step may have failed while it was staged, with more tokens than this one.
        self._num_staged = max(self._num_staged, num_tokens)

    def _write_integers(self, chunks: Sequence[Chunk], starts: list[int], sampled: list[int]) -> int:
        """Stages a step's integers on the host; returns how many of its tokens are read from the token pool."""
        self._begin(starts[-1] + chunks[-1].length)
        integers_5M, indices_4S = self._host_5M, self._host_4S
        # Lists for tokens that decode: an array for the few numbers of one token would cost more.
        tokens: list[int] = []
        decoding: list[tuple[int, int, int, int, int]] = []
        pooled: list[int] = []
        pooled_rows: list[int] = []
        for chunk, first in zip(chunks, starts, strict=True):
            request, start, stop = chunk.request, chunk.start, chunk.stop
            if chunk.length == 1 and not chunk.is_prompt:
                token_id = 0
                if start < len(request.token_ids):
                    token_id = request.token_ids[start]
                else:  # a step in flight samples it
                    pooled.append(first)
                    pooled_rows.append(request.pool_row)
                position = request.generated_position(start)
                slot = int(request.table.slots.numpy()[start])
                tokens.append(first)
                decoding.append((token_id, position, position, position, slot))
            else:
                integers_5T = integers_5M[:, first : first + chunk.length]
                integers_5T[0] = request.token_ids[start:stop]
                integers_5T[1:4] = request.positions(start, stop).numpy()
                integers_5T[4] = request.table.slots[start:stop].numpy()
        if decoding:
            integers_5M[:, tokens] = np.array(decoding).T
        if pooled:
            indices_4S[:2, : len(pooled)] = pooled, pooled_rows
        if sampled:
            indices_4S[2:, : len(sampled)] = sampled, [chunk.request.pool_row for chunk in chunks if chunk.samples]
        return len(pooled)

    def _land_chunk(self, chunk: Chunk, first_token: int) -> list[Landing]:
        """Copies the chunk's part of every media item to its tokens."""
        begin = time.perf_counter()
        landings = []
        for span in chunk.request.spans_in(chunk.start, chunk.stop):
            start, stop = max(span.start, chunk.start), min(span.start + span.length, chunk.stop)
            offset = first_token - chunk.start
            embeddings = chunk.request.media.received[span.item_index]
            landings.append(Landing(embeddings, span.first_row + start - span.start, offset + start, offset + stop))
            self.land(landings[-1])
        chunk.request.timings.land_s += time.perf_counter() - begin
        return landings


def _views(staged: Any, num_integers: int) -> tuple[Any, Any]:
    """Views: [5, M] integers of tokens; [4, S] pooled tokens, their pool rows, sampled tokens, their pool rows."""
    return staged[:num_integers].reshape(_NUM_INTEGERS, -1), staged[num_integers:].reshape(4, -1)
