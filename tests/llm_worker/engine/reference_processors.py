"""The sampling parameters as transformers' logits processors, in vLLM's order."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vitrine_vlm.llm_worker.engine.request import SamplingParams


class OfAnswer(LogitsProcessor):  # type: ignore[misc]  # untyped
    """A processor that is given the tokens of the answer only."""

    def __init__(self, num_prompt: int, processor: LogitsProcessor) -> None:
        self._num_prompt, self._processor = num_prompt, processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        processed: torch.Tensor = self._processor(input_ids[:, self._num_prompt :], scores)
        return processed


class OpenAiPenalties(LogitsProcessor):  # type: ignore[misc]  # untyped
    """As in OpenAI's documentation: mu[j] -= c[j] * frequency_penalty + float(c[j] > 0) * presence_penalty."""

    def __init__(self, frequency_penalty: float, presence_penalty: float) -> None:
        self._frequency_penalty, self._presence_penalty = frequency_penalty, presence_penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, answer in enumerate(input_ids.tolist()):
            for token_id in set(answer):
                scores[row, token_id] -= answer.count(token_id) * self._frequency_penalty + self._presence_penalty
        return scores


def processors(params: SamplingParams, num_prompt: int) -> LogitsProcessorList:
    """All that change which token is the most probable one."""
    found: list[LogitsProcessor] = []
    if params.allowed_token_ids is not None:
        allowed = sorted(params.allowed_token_ids)
        found.append(PrefixConstrainedLogitsProcessor(lambda batch, ids: allowed, num_beams=1))
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        found.append(OfAnswer(num_prompt, NoBadWordsLogitsProcessor(words)))
    if params.min_tokens:
        stop = sorted(params.stop_token_ids)
        found.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, stop, device="cpu"))
    if params.logit_bias:
        found.append(SequenceBiasLogitsProcessor([[[key], float(bias)] for key, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found.append(OfAnswer(num_prompt, OpenAiPenalties(params.frequency_penalty, params.presence_penalty)))
    return LogitsProcessorList(found)


def warpers(params: SamplingParams) -> LogitsProcessorList:
    """All others, which only a drawn token depends on."""
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(TopPLogitsWarper(params.top_p))
    return LogitsProcessorList(found)
