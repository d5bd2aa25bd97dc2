"""Log-probabilities of a prompt's tokens, from the logits of the tokens in front of them.

They are computed in the steps that prefill the prompt, a few tokens at a time: the logits of a whole chunk would need
more memory than the KV cache leaves.

Shapes: T scored tokens, C hidden size, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.pinned_copy import to_device, to_host
from vitrine_vlm.llm_worker.engine.request import TokenLogprobs

_NUM_AT_ONCE = 64


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens [start, stop) of a step, whose logits are those of the prompt's next tokens.

    next_token_ids: the tokens behind each. num_top: the number of most probable tokens that are reported.
    """

    start: int
    stop: int
    next_token_ids: list[int]
    num_top: int


@dataclass(frozen=True)
class LogprobTensors:
    """Log-probabilities of `next_token_ids`, and those of the most probable tokens in their places, with their ids.

    own_T, top_TK, top_ids_TK: on the device, or on the host once what computes them has ended.
    """

    next_token_ids: list[int]
    own_T: torch.Tensor
    top_TK: torch.Tensor
    top_ids_TK: torch.Tensor

    def copy_to_host(self) -> LogprobTensors:
        """Queues the copies."""
        return LogprobTensors(self.next_token_ids, to_host(self.own_T), to_host(self.top_TK), to_host(self.top_ids_TK))

    def read(self) -> list[TokenLogprobs]:
        """Returns those of each token, from the host."""
        rows = zip(
            self.next_token_ids, self.own_T.tolist(), self.top_ids_TK.tolist(), self.top_TK.tolist(), strict=True
        )
        return [
            TokenLogprobs(token_id, own, tuple(zip(top_ids, top, strict=True))) for token_id, own, top_ids, top in rows
        ]


def scored_tokens(chunks: Sequence[Chunk]) -> dict[Chunk, ScoredTokens]:
    """The scored tokens of a step with these chunks, by chunk."""
    found: dict[Chunk, ScoredTokens] = {}
    if all(chunk.request.sampled.params.prompt_logprobs is None for chunk in chunks):
        return found
    starts = accumulate((chunk.length for chunk in chunks), initial=0)
    for chunk, start in zip(chunks, starts, strict=False):
        request = chunk.request
        # The whole prompt may not be known yet, but a token behind the chunk always is.
        length = min(chunk.stop, request.num_prompt_tokens - 1) - chunk.start
        num_top = request.sampled.params.prompt_logprobs
        if request.is_scored and num_top is not None and length > 0:
            following = request.token_ids[chunk.start + 1 : chunk.start + length + 1]
            found[chunk] = ScoredTokens(start, start + length, following, num_top)
    return found


def prompt_logprobs(
    hidden_TC: torch.Tensor, scored: ScoredTokens, logits: Callable[[torch.Tensor], torch.Tensor]
) -> LogprobTensors:
    """
    Args:
        hidden_TC: of all tokens of the step.
        logits: turns hidden states into logits, [T, V].
    """
    next_T = to_device(hidden_TC.device, scored.next_token_ids)
    parts = []
    for first in range(scored.start, scored.stop, _NUM_AT_ONCE):
        stop = min(first + _NUM_AT_ONCE, scored.stop)
        next_ids = next_T[first - scored.start : stop - scored.start]
        parts.append(token_logprobs(logits(hidden_TC[first:stop]), next_ids, scored.num_top))
    own, top, top_ids = (torch.cat(each) for each in zip(*parts, strict=True))
    return LogprobTensors(scored.next_token_ids, own, top, top_ids)


def token_logprobs(
    logits_TV: torch.Tensor, token_ids_T: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of these tokens [T], and of the most probable ones [T, K], and the ids of these [T, K]."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    top_TK, top_ids_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[1]))
    return logprobs_TV.gather(1, token_ids_T[:, None])[:, 0], top_TK, top_ids_TK
