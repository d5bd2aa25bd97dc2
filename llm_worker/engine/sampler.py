"""Chooses the next tokens of a batch of sequences where their logits are, and brings only the choice to the host.

Shapes: B sequences, V vocabulary, S sequences that draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_worker.engine.request import SamplingParams, TokenLogprobs

# The quotients of smaller ones overflow, and the best token already has all of the probability.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class NextToken:
    """token_id: None where there is none to choose, as the logits were no numbers."""

    token_id: int | None
    logprobs: TokenLogprobs | None


def sample(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[NextToken]:
    """For each sequence the most probable token at temperature 0, else one drawn from what top-k and top-p leave.

    Args:
        logits_BV: on any device; what is drawn from and reported is computed in float32.
        generators: each sequence's own, on the CPU, so that its draws do not depend on its neighbours.
    """
    chosen_B = logits_BV.argmax(-1)
    drawing = [row for row, each in enumerate(params) if each.temperature >= _GREEDY_BELOW]
    if drawing:
        rows = torch.tensor(drawing, device=logits_BV.device)
        uniform = [float(torch.rand((), generator=generators[row], dtype=torch.float64)) for row in drawing]
        chosen_B[rows] = _draw(logits_BV[rows].float(), [params[row] for row in drawing], uniform)
    token_ids = chosen_B.tolist()
    logprobs = _logprobs(logits_BV, chosen_B, params)
    return [
        NextToken(token_id if token_id >= 0 else None, each) for token_id, each in zip(token_ids, logprobs, strict=True)
    ]


def skip_draw(params: SamplingParams, generator: torch.Generator) -> None:
    """Leaves a sequence's generator as if a token had been chosen here that was chosen elsewhere."""
    if params.temperature >= _GREEDY_BELOW:
        torch.rand((), generator=generator, dtype=torch.float64)


def _draw(logits_SV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> torch.Tensor:
    """A token of each row by inverting its distribution at a number from [0, 1); -1 where there is no distribution."""
    device = logits_SV.device
    temperature_S, top_p_S, uniform_S = (
        torch.tensor(values, dtype=torch.float32, device=device)
        for values in ([each.temperature for each in params], [each.top_p for each in params], uniform)
    )
    vocab_size = logits_SV.shape[1]
    top_k = [min(each.top_k, vocab_size) if each.top_k > 0 else vocab_size for each in params]
    ordered_SV, index_SV = (logits_SV / temperature_S[:, None]).sort(dim=-1, descending=True)
    # Those as good as the k-th stay, too.
    kth_S1 = ordered_SV.gather(1, torch.tensor(top_k, device=device)[:, None] - 1)
    probabilities_SV = ordered_SV.masked_fill(ordered_SV < kth_S1, -torch.inf).softmax(-1)
    # A token stays if those before it have not yet reached the mass. The first always does, however small top_p.
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    beyond_SV = before_SV >= top_p_S[:, None]
    beyond_SV[:, 0] = False
    mass_SV = probabilities_SV.masked_fill(beyond_SV, 0.0).cumsum(-1)
    total_S1 = mass_SV[:, -1:]
    # The first token whose mass is above the drawn part of all there is; rounding must not lead behind the last.
    place_S1 = (mass_SV <= uniform_S[:, None] * total_S1).sum(-1, keepdim=True)
    last_S1 = (mass_SV < total_S1).sum(-1, keepdim=True)
    drawn_S = index_SV.gather(1, torch.minimum(place_S1, last_S1))[:, 0]
    return torch.where(total_S1[:, 0].isfinite(), drawn_S, -1)


def _logprobs(
    logits_BV: torch.Tensor, chosen_B: torch.Tensor, params: Sequence[SamplingParams]
) -> list[TokenLogprobs | None]:
    """Of the chosen tokens and of the most probable ones, before any sampling parameter; for those who ask."""
    found: list[TokenLogprobs | None] = [None] * len(params)
    asking = [row for row, each in enumerate(params) if each.logprobs is not None]
    if not asking:
        return found
    rows = torch.tensor(asking, device=logits_BV.device)
    logprobs_SV, chosen_S = logits_BV[rows].float().log_softmax(-1), chosen_B[rows]
    num_top = min(max(params[row].logprobs or 0 for row in asking), logprobs_SV.shape[1])
    values, indices = (each.tolist() for each in logprobs_SV.topk(num_top))
    own = logprobs_SV.gather(1, chosen_S.clamp_min(0)[:, None])[:, 0].tolist()
    for place, (row, token_id) in enumerate(zip(asking, chosen_S.tolist(), strict=True)):
        top = zip(indices[place], values[place], strict=True)
        found[row] = TokenLogprobs(token_id, own[place], tuple(top)[: params[row].logprobs])
    return found
