"""Chooses the next tokens of a batch of sequences on the device of their logits; only the choice is copied to the host.

Only reading the choice waits for a GPU, so the next step may be launched before that.

Shapes: B sequences, V vocabulary, S sequences that draw, A that ask for logprobs, K most probable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vitrine_vlm.llm_worker.engine.pinned_copy import to_device, to_host
from vitrine_vlm.llm_worker.engine.prompt_logprobs import token_logprobs
from vitrine_vlm.llm_worker.engine.request import SamplingParams, TokenLogprobs


class NextToken(NamedTuple):
    """A chosen token. token_id: None where the logits were NaN, so that none could be chosen."""

    token_id: int | None
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Choice:
    """Next tokens of a batch, on the device of the logits, which may still compute them.

    token_ids_B: int64. All are tokens of the vocabulary, also those of sequences whose logits are NaN.
    drawing: indices of the sequences that draw; is_drawn_S: whether each had a distribution to draw from.
    asking: the number of most probable tokens that are reported, by index of the sequences with logprobs.
    logprobs: of the chosen tokens [A], of the most probable ones [A, K], and the ids of these [A, K].
    """

    token_ids_B: torch.Tensor
    drawing: list[int]
    is_drawn_S: torch.Tensor | None
    asking: dict[int, int]
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def copy_to_host(self) -> ChoiceOnHost:
        """Queues the copies.

        What the device does with the tokens is to be queued in front: behind the copies its stream waits for them, and
        a GPU that two processes share goes to the other one meanwhile.
        """
        return ChoiceOnHost(self)


class ChoiceOnHost:
    """A choice on its way to the host."""

    def __init__(self, choice: Choice) -> None:
        token_ids_B = choice.token_ids_B
        self._drawing, self._asking = choice.drawing, choice.asking
        # Asynchronous copies, to pinned memory.
        self._token_ids = to_host(token_ids_B)
        self._is_drawn = to_host(choice.is_drawn_S) if choice.is_drawn_S is not None else None
        self._logprobs = [to_host(each) for each in choice.logprobs or ()]
        self._arrived = torch.cuda.current_stream(token_ids_B.device).record_event() if token_ids_B.is_cuda else None

    def wait(self) -> None:
        """Waits until the choice, and so the step whose logits it is made from, is computed."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> list[NextToken]:
        """Returns the next token of each sequence, after `wait`."""
        self.wait()
        token_ids: list[int] = self._token_ids.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if self._asking:
            own, values, indices = (each.tolist() for each in self._logprobs)
            for place, (row, count) in enumerate(self._asking.items()):
                top = tuple(zip(indices[place], values[place], strict=True))
                logprobs[row] = TokenLogprobs(token_ids[row], own[place], top[:count])
        tokens = [NextToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]
        if self._is_drawn is not None:
            for row, is_drawn in zip(self._drawing, self._is_drawn.tolist(), strict=True):
                if not is_drawn:
                    tokens[row] = NextToken(None, None)
        return tokens


def choose(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    uniform: Sequence[float],
    raw_logits_BV: torch.Tensor | None = None,
) -> Choice:
    """Chooses each sequence's most probable token at temperature 0, else draws one that min-p, top-k and top-p leave.

    Args:
        logits_BV: on any device, processed (see `logits_processing.py`); probabilities are computed in float32.
        uniform: a random number from [0, 1) for each sequence; not used where it is greedy.
        raw_logits_BV: the model's logits, whose log-probabilities are reported; None where they are the same.
    """
    token_ids_B = logits_BV.argmax(-1)
    drawing = [row for row, each in enumerate(params) if not each.is_greedy]
    is_drawn_S = None
    if drawing:
        rows = to_device(logits_BV.device, drawing)
        drawn_S, is_drawn_S = _draw(
            logits_BV[rows].float(), [params[row] for row in drawing], [uniform[row] for row in drawing]
        )
        token_ids_B.index_copy_(0, rows, drawn_S)
    asking = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
    raw_logits_BV = logits_BV if raw_logits_BV is None else raw_logits_BV
    logprobs = _logprobs(raw_logits_BV, token_ids_B, asking) if asking else None
    return Choice(token_ids_B, drawing, is_drawn_S, asking, logprobs)


def _draw(
    logits_SV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token of each sequence by inverting its distribution at a number from [0, 1).

    Returns:
        The tokens, and whether each sequence had a distribution, [S] bool; without one its token is arbitrary.
    """
    device = logits_SV.device
    temperature_S, top_p_S, uniform_S = (
        to_device(device, values, torch.float32)
        for values in ([each.temperature for each in params], [each.top_p for each in params], uniform)
    )
    vocab_size = logits_SV.shape[1]
    top_k = [min(each.top_k, vocab_size) if each.top_k > 0 else vocab_size for each in params]
    ordered_SV, index_SV = (logits_SV / temperature_S[:, None]).sort(dim=-1, descending=True)
    if any(each.min_p for each in params):
        least_S1 = to_device(device, [each.min_p for each in params], torch.float32)[:, None]
        probabilities_SV = ordered_SV.softmax(-1)
        ordered_SV = ordered_SV.masked_fill(probabilities_SV < least_S1 * probabilities_SV[:, :1], -torch.inf)
    # Tokens with the same logit as the k-th are kept, too.
    kth_S1 = ordered_SV.gather(1, to_device(device, top_k)[:, None] - 1)
    probabilities_SV = ordered_SV.masked_fill(ordered_SV < kth_S1, -torch.inf).softmax(-1)
    # A token is kept while the mass before it is below top_p. The first always is, however small top_p is.
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    beyond_SV = before_SV >= top_p_S[:, None]
    beyond_SV[:, 0] = False
    mass_SV = probabilities_SV.masked_fill(beyond_SV, 0.0).cumsum(-1)
    total_S1 = mass_SV[:, -1:]
    # The first token whose cumulated mass exceeds the drawn part of the total; rounding must not lead behind the last.
    # Comparisons with NaN are false, so both places are 0 then.
    place_S1 = (mass_SV <= uniform_S[:, None] * total_S1).sum(-1, keepdim=True)
    last_S1 = (mass_SV < total_S1).sum(-1, keepdim=True)
    drawn_S = index_SV.gather(1, torch.minimum(place_S1, last_S1))[:, 0]
    return drawn_S, total_S1[:, 0].isfinite()


def _logprobs(
    logits_BV: torch.Tensor, token_ids_B: torch.Tensor, asking: dict[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities before any sampling parameter; see `Choice`."""
    rows = to_device(logits_BV.device, list(asking))
    return token_logprobs(logits_BV[rows], token_ids_B[rows], max(asking.values()))
