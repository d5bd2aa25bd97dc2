"""The sampling parameters that change logits, applied to a batch on its device, in vLLM's order.

1. allowed_token_ids, 2. bad_words, 3. min_tokens, 4. logit_bias, 5. repetition penalty, 6. frequency penalty,
7. presence penalty, and last the grammar. Temperature, min_p, top_k and top_p follow in `sampler.py`. The first four
exclude a token or add to its logit, so their order among each other has no effect.

What a request's tokens contribute is kept on the device, because the newest token of a request may be known only there:
the step that samples it is still in flight. Counts are kept in a table, to which each step adds the tokens it samples.
The last token of a bad word's beginning is compared with the token pool. Only grammars need to know it: the logits of a
step with any are processed once the host has the tokens of the step in front.

Source: vllm/v1/sample/sampler.py (0.32); `repetition_penalty` is also transformers' RepetitionPenaltyLogitsProcessor.

Shapes: B sequences of the step, V vocabulary, K sequences with penalties or with a bias, N excluded tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.grammar_masks import GrammarMasks
from vitrine_vlm.llm_worker.engine.pinned_copy import to_device
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool
from vitrine_vlm.llm_worker.engine.vocab_table import VocabTable

# A count has the number of times that the answer has a token, and this bit where the prompt has it.
_IN_PROMPT = 1 << 30
_NO_TOKEN = -1


class _Exclusion(NamedTuple):
    """Token `token_id` is excluded for a sequence of the step, unless `newest` is another than its newest token."""

    row: int
    token_id: int
    pool_row: int
    newest: int = _NO_TOKEN


class LogitsProcessor:
    """Changes logits as the requests of a step ask for; keeps what it needs of a request until `release`.

    Belongs to the engine's thread.
    """

    def __init__(self, vocab_size: int, token_pool: TokenPool) -> None:
        self._vocab_size = vocab_size
        self._token_pool = token_pool
        self._device = token_pool.tokens_R.device
        self._bias = VocabTable(vocab_size, torch.float32, self._device)
        self._grammar_masks = GrammarMasks(vocab_size, self._device)
        self._counts = VocabTable(vocab_size, torch.int32, self._device)
        # The epoch and the number of tokens that a request's counts are of.
        self._counted: dict[int, tuple[int, int]] = {}

    def process(self, chunks: Sequence[Chunk], logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns the logits to choose from, [B, V]: float32, or `logits_BV` itself where no request changes any.

        Args:
            chunks: of the step, those that sample; a request's tokens are its newest ones, those in flight included.
        """
        processed = [row for row, chunk in enumerate(chunks) if chunk.request.sampled.params.changes_logits]
        if not processed:
            return logits_BV
        unchanged_BV = logits_BV
        logits_BV = logits_BV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        params = {row: chunks[row].request.sampled.params for row in processed}
        if biased := [row for row, each in params.items() if each.has_bias]:
            self._add_bias(chunks, biased, logits_BV)
        if exclusions := [each for row in processed for each in self._exclusions(row, chunks[row])]:
            self._exclude(exclusions, logits_BV)
        if penalized := [row for row, each in params.items() if each.has_penalties]:
            self._penalize(chunks, penalized, logits_BV)
        if matchers := {row: each for row in processed if (each := chunks[row].request.sampled.matcher) is not None}:
            rows_K = to_device(self._device, list(matchers))
            masked_KV = self._grammar_masks.apply(
                list(matchers.values()),
                [params[row] for row in matchers],
                logits_BV.index_select(0, rows_K),
                unchanged_BV.index_select(0, rows_K),
            )
            logits_BV.index_copy_(0, rows_K, masked_KV)
        return logits_BV

    def count(self, chunks: Sequence[Chunk], token_ids_B: torch.Tensor) -> None:
        """Counts the tokens that the step chooses for these chunks, whose logits were processed before."""
        if not self._counts:
            return
        penalized = [row for row, chunk in enumerate(chunks) if chunk.request.sampled.params.has_penalties]
        if not penalized:
            return
        for row in penalized:
            chunk = chunks[row]
            self._counted[chunk.request.key] = (chunk.epoch, chunk.stop + 1)
        tokens_K = token_ids_B
        if len(penalized) < len(chunks):
            tokens_K = token_ids_B.index_select(0, to_device(self._device, penalized))
        places_K = self._table_rows(self._counts, chunks, penalized) * self._vocab_size + tokens_K
        self._counts.rows_RV.view(-1).index_add_(0, places_K, torch.ones_like(places_K, dtype=torch.int32))

    def release(self, key: int) -> None:
        """Releases what is kept of the request with this key."""
        self._bias.release(key)
        self._counts.release(key)
        self._counted.pop(key, None)

    def _add_bias(self, chunks: Sequence[Chunk], rows: list[int], logits_BV: torch.Tensor) -> None:
        for row in rows:
            request = chunks[row].request
            if request.key not in self._bias:
                self._write_bias(request.sampled.params, self._bias.allocate(request.key))
        bias_KV = self._bias.rows_RV.index_select(0, self._table_rows(self._bias, chunks, rows))
        logits_BV.index_add_(0, to_device(self._device, rows), bias_KV)

    def _write_bias(self, params: SamplingParams, bias_V: torch.Tensor) -> None:
        allowed = params.allowed_token_ids
        bias_V.fill_(0.0 if allowed is None else -torch.inf)
        if allowed is not None:
            bias_V.index_fill_(0, to_device(self._device, list(allowed)), 0.0)
        if params.logit_bias:
            values = to_device(self._device, list(params.logit_bias.values()), torch.float32)
            bias_V.index_add_(0, to_device(self._device, list(params.logit_bias)), values)
        if params.bad_tokens:
            bias_V.index_fill_(0, to_device(self._device, params.bad_tokens), -torch.inf)

    def _exclusions(self, row: int, chunk: Chunk) -> Iterator[_Exclusion]:
        """Tokens that are excluded at this place of the answer: stop tokens, and those that would end a bad word."""
        request = chunk.request
        params, known, num_prompt = request.sampled.params, request.token_ids, request.num_prompt_tokens
        if chunk.stop - num_prompt < params.min_tokens:
            for token_id in params.stop_token_ids:
                if 0 <= token_id < self._vocab_size:  # others are never chosen
                    yield _Exclusion(row, token_id, request.pool_row)
        is_newest_in_flight = chunk.stop > len(known)
        for *beginning, last in params.bad_phrases:
            newest = beginning.pop() if is_newest_in_flight else _NO_TOKEN
            start = len(known) - len(beginning)
            if start >= num_prompt and known[start:] == beginning:
                yield _Exclusion(row, last, request.pool_row, newest)

    def _exclude(self, exclusions: list[_Exclusion], logits_BV: torch.Tensor) -> None:
        rows_N, token_ids_N, pool_rows_N, newest_N = to_device(self._device, list(zip(*exclusions, strict=True)))
        is_excluded_N = (newest_N == _NO_TOKEN) | (newest_N == self._token_pool.tokens_R.index_select(0, pool_rows_N))
        limits_N = torch.where(is_excluded_N, -torch.inf, torch.inf)
        # The least of all, as a token may be excluded by one bad word and not by another.
        logits_BV.view(-1).scatter_reduce_(0, rows_N * self._vocab_size + token_ids_N, limits_N, "amin")

    def _penalize(self, chunks: Sequence[Chunk], rows: list[int], logits_BV: torch.Tensor) -> None:
        for row in rows:
            chunk = chunks[row]
            if self._counted.get(chunk.request.key) != (chunk.epoch, chunk.stop):
                self._count_from_host(chunk)
        counts_KV = self._counts.rows_RV.index_select(0, self._table_rows(self._counts, chunks, rows))
        params = [chunks[row].request.sampled.params for row in rows]
        repetition_K1, frequency_K1, presence_K1 = to_device(
            self._device,
            [
                [each.repetition_penalty for each in params],
                [each.frequency_penalty for each in params],
                [each.presence_penalty for each in params],
            ],
            torch.float32,
        )[:, :, None]
        rows_K = to_device(self._device, rows)
        logits_KV = logits_BV.index_select(0, rows_K)
        repeated_KV = torch.where(logits_KV > 0, logits_KV / repetition_K1, logits_KV * repetition_K1)
        logits_KV = torch.where(counts_KV > 0, repeated_KV, logits_KV)
        counts_KV &= _IN_PROMPT - 1
        logits_KV -= frequency_K1 * counts_KV
        logits_KV -= presence_K1 * (counts_KV > 0)
        logits_BV.index_copy_(0, rows_K, logits_KV)

    def _count_from_host(self, chunk: Chunk) -> None:
        """Counts a request's tokens: before its first token is sampled, or after it was rolled back.

        The host has all of them then, as no step in flight counts any more.
        """
        request = chunk.request
        counts_V = self._counts.allocate(request.key).zero_()
        num_prompt = request.num_prompt_tokens
        if request.sampled.params.repetition_penalty != 1:  # nothing else asks for the prompt's
            counts_V.index_fill_(0, to_device(self._device, request.token_ids[:num_prompt]), _IN_PROMPT)
        if generated := request.token_ids[num_prompt:]:
            token_ids = to_device(self._device, generated)
            counts_V.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.int32))

    def _table_rows(self, table: VocabTable, chunks: Sequence[Chunk], rows: list[int]) -> torch.Tensor:
        return to_device(self._device, [table.row_of(chunks[row].request.key) for row in rows])
