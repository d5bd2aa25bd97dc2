"""Chooses the next token of one sequence."""

from __future__ import annotations

import torch

from llm_worker.engine.request import SamplingParams, TokenLogprobs

# The quotients of smaller ones overflow, and the best token already has all of the probability.
_GREEDY_BELOW = 1e-5


def sample(logits_V: torch.Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """A token id: the most probable at temperature 0, else drawn from what top-k and top-p leave.

    Args:
        logits_V: float32, on the CPU. generator: the sequence's own, so that its draws do not depend on its neighbours.
    """
    if sampling.temperature < _GREEDY_BELOW:
        return int(logits_V.argmax())
    scaled_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(scaled_V):
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities_V = scaled_V.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities_V.sort(descending=True)
        # A token stays if those before it have not yet reached the mass. The first always does, however small top_p.
        ordered[1:][(ordered.cumsum(0) - ordered)[1:] >= sampling.top_p] = 0
        probabilities_V = torch.zeros_like(probabilities_V).scatter_(0, index, ordered)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def token_logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of the chosen token and of the `num_top` most probable, before any sampling parameter."""
    logprobs_V = logits_V.log_softmax(-1)
    values, indices = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)
