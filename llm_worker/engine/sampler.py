"""Chooses the next tokens of a batch of sequences where their logits are, and copies only the choice to the host.

Only reading the choice waits for a GPU: the next step may be launched before that.

Shapes: B sequences, V vocabulary, S sequences that draw, A that ask for logprobs, K most probable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vitrine_vlm.llm_worker.engine.request import SamplingParams, TokenLogprobs


class NextToken(NamedTuple):
    """token_id: None where there is none to choose, as the logits were no numbers."""

    token_id: int | None
    logprobs: TokenLogprobs | None


class Choice:
    """Next tokens of a batch.

    token_ids_B: int64 on the device of the logits, which may still be computed there. All are tokens of the vocabulary,
        also those of rows whose logits are no numbers.
    """

    def __init__(
        self,
        token_ids_B: torch.Tensor,
        drawing: list[int],
        is_drawn_S: torch.Tensor | None,
        asking: dict[int, int],
        logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """
        Args:
            drawing: rows that draw; is_drawn_S: whether each of them had a distribution to draw from.
            asking: rows that ask for logprobs, and for those of how many tokens.
            logprobs: of the chosen tokens [A], of the most probable ones [A, K], and which these are [A, K].
        """
        self.token_ids_B = token_ids_B
        self._drawing, self._asking = drawing, asking
        # To memory that a GPU can write while the host goes on.
        self._token_ids = _to_host(token_ids_B)
        self._is_drawn = _to_host(is_drawn_S) if is_drawn_S is not None else None
        self._logprobs = [_to_host(each) for each in logprobs or ()]
        self._arrived = torch.cuda.current_stream(token_ids_B.device).record_event() if token_ids_B.is_cuda else None

    def wait(self) -> None:
        """Waits until the choice is made, and with it the step whose logits it is made from."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> list[NextToken]:
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


def choose(logits_BV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Choice:
    """For each sequence the most probable token at temperature 0, else one drawn from what top-k and top-p leave.

    Args:
        logits_BV: on any device; what is drawn from and reported is computed in float32.
        uniform: what each sequence draws by, from [0, 1); not looked at where it is greedy.
    """
    token_ids_B = logits_BV.argmax(-1)
    drawing = [row for row, each in enumerate(params) if not each.is_greedy]
    is_drawn_S = None
    if drawing:
        rows = _on(logits_BV.device, drawing)
        drawn_S, is_drawn_S = _draw(
            logits_BV[rows].float(), [params[row] for row in drawing], [uniform[row] for row in drawing]
        )
        token_ids_B.index_copy_(0, rows, drawn_S)
    asking = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
    logprobs = _logprobs(logits_BV, token_ids_B, asking) if asking else None
    return Choice(token_ids_B, drawing, is_drawn_S, asking, logprobs)


def _draw(
    logits_SV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row by inverting its distribution at a number from [0, 1).

    Returns:
        The tokens, and whether each row had a distribution, [S] bool; without one its token is any of the vocabulary.
    """
    device = logits_SV.device
    temperature_S, top_p_S, uniform_S = (
        _on(device, values, torch.float32)
        for values in ([each.temperature for each in params], [each.top_p for each in params], uniform)
    )
    vocab_size = logits_SV.shape[1]
    top_k = [min(each.top_k, vocab_size) if each.top_k > 0 else vocab_size for each in params]
    ordered_SV, index_SV = (logits_SV / temperature_S[:, None]).sort(dim=-1, descending=True)
    # Those as good as the k-th stay, too.
    kth_S1 = ordered_SV.gather(1, _on(device, top_k)[:, None] - 1)
    probabilities_SV = ordered_SV.masked_fill(ordered_SV < kth_S1, -torch.inf).softmax(-1)
    # A token stays if those before it have not yet reached the mass. The first always does, however small top_p.
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    beyond_SV = before_SV >= top_p_S[:, None]
    beyond_SV[:, 0] = False
    mass_SV = probabilities_SV.masked_fill(beyond_SV, 0.0).cumsum(-1)
    total_S1 = mass_SV[:, -1:]
    # The first token whose mass is above the drawn part of all there is; rounding must not lead behind the last. Of
    # masses that are no numbers none is below or above another: both places are the first.
    place_S1 = (mass_SV <= uniform_S[:, None] * total_S1).sum(-1, keepdim=True)
    last_S1 = (mass_SV < total_S1).sum(-1, keepdim=True)
    drawn_S = index_SV.gather(1, torch.minimum(place_S1, last_S1))[:, 0]
    return drawn_S, total_S1[:, 0].isfinite()


def _logprobs(
    logits_BV: torch.Tensor, token_ids_B: torch.Tensor, asking: dict[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before any sampling parameter; see `Choice`."""
    rows = _on(logits_BV.device, list(asking))
    logprobs_AV = logits_BV[rows].float().log_softmax(-1)
    values_AK, indices_AK = logprobs_AV.topk(min(max(asking.values()), logprobs_AV.shape[1]))
    own_A = logprobs_AV.gather(1, token_ids_B[rows][:, None])[:, 0]
    return own_A, values_AK, indices_AK


def _on(device: torch.device, values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Copied there without waiting for what runs there."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _to_host(on_device: torch.Tensor) -> torch.Tensor:
    """Copied without waiting; a GPU's copy has arrived once an event behind it has passed."""
    return on_device.to("cpu", non_blocking=True)
