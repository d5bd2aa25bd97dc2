"""One request inside the engine: what is known of its prompt, what is computed, and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from embedding_transport.errors import InternalError, VitrineError
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.kv_cache import BlockTable
from llm_worker.engine.request import EngineTimings, ExpandedPrompt, MediaSpan, SamplingParams, TokenOutput

Deliver = Callable[[TokenOutput | VitrineError, EngineTimings], None]


@dataclass(eq=False)
class Sequence:
    """Owned by the engine's thread.

    token_ids: the text in front of the first media item, then the whole prompt, then what was generated.
    num_computed: tokens whose KV is in the cache. reserved: blocks for the whole generation are held.
    """

    request_id: str
    arrival: int
    token_ids: list[int]
    sampling: SamplingParams
    deliver: Deliver
    prompt: ExpandedPrompt | None = None
    rows: dict[int, EmbeddingRows] = field(default_factory=dict)
    blocks: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    max_total_tokens: int = 0
    reserved: bool = False
    finished: bool = False
    land_s: float = 0.0
    prefill_s: float = 0.0
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed % 2**64)  # torch takes 64 bits, JSON has no limit
        else:
            self.generator.seed()

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids) if self.prompt is not None else len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_runnable(self) -> int:
        """Tokens that could be computed now: all up to the first media rows that are not here yet."""
        if self.prompt is None:
            # One is kept back: should nothing follow, the last token has yet to run to be sampled from.
            return max(len(self.token_ids) - 1, 0)
        if self.num_computed >= self.num_prompt_tokens:
            return len(self.token_ids)
        late = (
            span.start
            for span in self.prompt.spans
            if span.item_index not in self.rows and span.start + span.length > self.num_computed
        )
        return min(late, default=len(self.token_ids))

    def set_prompt(self, prompt: ExpandedPrompt) -> None:
        if prompt.token_ids[: len(self.token_ids)] != self.token_ids:
            raise InternalError(f"the prompt of {self.request_id} does not begin with the text that was prefilled")
        self.prompt = prompt
        self.token_ids = list(prompt.token_ids)

    def spans_in(self, start: int, stop: int) -> list[MediaSpan]:
        """Media spans that overlap prompt positions [start, stop)."""
        if self.prompt is None or start >= self.num_prompt_tokens:
            return []
        return [span for span in self.prompt.spans if span.start < stop and span.start + span.length > start]

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """M-RoPE positions of tokens [start, stop), [3, stop - start] int64."""
        if self.prompt is None:
            return torch.arange(start, stop).expand(3, -1)
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return self.prompt.positions_3N[:, start:stop]
        assert start >= num_prompt, "a chunk ends with the prompt: what follows is not known before"
        offset = self.prompt.next_position - num_prompt
        return torch.arange(start + offset, stop + offset).expand(3, -1)

    def release_landed_rows(self) -> None:
        """Releases the rows of every item whose last row is in the cache."""
        assert self.prompt is not None
        needed = {span.item_index for span in self.prompt.spans if span.start + span.length > self.num_computed}
        for item_index in [each for each in self.rows if each not in needed]:
            self.rows.pop(item_index).release()

    def release_rows(self) -> None:
        for rows in self.rows.values():
            rows.release()
        self.rows.clear()

    def timings(self) -> EngineTimings:
        first = self.first_token_at
        return EngineTimings(
            land_ms=self.land_s * 1000,
            prefill_ms=self.prefill_s * 1000,
            decode_ms=(time.perf_counter() - first) * 1000 if first is not None else 0.0,
            ttft_ms=(first - self.submitted_at) * 1000 if first is not None else 0.0,
        )
