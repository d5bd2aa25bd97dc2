"""A request's share of a step."""

from __future__ import annotations

from typing import NamedTuple

from vitrine_vlm.llm_worker.engine.request_state import RequestState


class Chunk(NamedTuple):
    """Tokens [start, stop) of a request run in this step; `samples` where they end at its last token.

    epoch: of the request, when the chunk was made.
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
    def counts(self) -> bool:
        """Whether its request still runs and has not lost what the chunk builds on."""
        return self.epoch == self.request.epoch
