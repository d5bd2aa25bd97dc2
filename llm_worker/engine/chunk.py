"""The tokens of one request in a step."""

from __future__ import annotations

from typing import NamedTuple

from vitrine_vlm.llm_worker.engine.request_state import RequestState


class Chunk(NamedTuple):
    """Tokens [start, stop) of a request, to be computed in one step.

    samples: whether they end at its last token, so that the next one is sampled.
    epoch: the request's, when the chunk was made.
    """

    request: RequestState
    start: int
    stop: int
    samples: bool
    epoch: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_prompt(self) -> bool:
        """Whether it begins with a token of the prompt, and not with a generated one."""
        return self.start < self.request.num_prompt_tokens

    @property
    def is_current(self) -> bool:
        """Whether its request still runs and has not been rolled back since: otherwise its results are discarded."""
        return self.epoch == self.request.epoch
