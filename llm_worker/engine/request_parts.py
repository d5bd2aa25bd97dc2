"""The parts of a request's state, see `request_state.py`. They belong to the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.request import EngineTimings, ExpandedPrompt, SamplingParams
from vitrine_vlm.types import EmbeddingRows


@dataclass(slots=True)
class MediaInputs:
    """The embeddings of a prompt's media items that have come and are not all landed yet.

    received: by item. requested_items: items whose embeddings were announced or requested, and have not come yet.
    num_lost: how often embeddings were lost since some were last landed.
    """

    received: dict[int, EmbeddingRows] = field(default_factory=dict)
    requested_items: set[int] = field(default_factory=set)
    num_lost: int = 0

    def first_missing(self, prompt: ExpandedPrompt, start: int) -> int | None:
        """The start of the first span behind position `start` whose embeddings are not here; None where all are."""
        missing = (span.start for span in prompt.spans if span.stop > start and span.item_index not in self.received)
        return next(missing, None)

    def request_missing(self, prompt: ExpandedPrompt, start: int) -> list[int]:
        """Returns items with embeddings from `start` on that are neither here nor requested; marks them requested."""
        if not prompt.spans:
            return []
        missing = prompt.items_from(start) - self.received.keys() - self.requested_items
        self.requested_items |= missing
        return sorted(missing)

    def release(self, items: Iterable[int]) -> None:
        for item_index in list(items):
            self.received.pop(item_index).release()


@dataclass(slots=True)
class RemoteKv:
    """The KV of a prompt that a prefill worker computes.

    received: a row a token, from `first_token` on, until it has landed; received_at: when it came, by
        `time.perf_counter`. is_landing: a step in flight copies it into the cache. is_requested: it is requested and
        has not come.
    num_lost: how often it was lost.
    """

    received: EmbeddingRows | None = None
    received_at: float = 0.0
    is_landing: bool = False
    first_token: int = 0
    is_requested: bool = False
    num_lost: int = 0

    @property
    def can_land(self) -> bool:
        return self.received is not None and not self.is_landing

    def request_missing(self, start: int) -> bool:
        """Returns whether KV from token `start` on is neither here nor requested, and marks it as requested."""
        if self.is_requested:
            return False
        if self.first_token > start:
            self.release()  # KV in front of it has been lost since it was requested
        if self.received is not None:
            return False
        self.is_requested, self.first_token = True, start
        return True

    def release(self) -> None:
        self.is_landing = False
        if self.received is not None:
            self.received.release()
            self.received = None


@dataclass
class SampledTokens:
    """The sampling of a request's tokens, and the number of tokens that the host does not know yet.

    matcher: of the params' grammar, which has accepted the tokens that the host knows.
    num_in_flight: tokens that steps in flight sample.
    """

    params: SamplingParams
    matcher: GrammarMatcher | None = None
    num_in_flight: int = 0
    _uniform: list[float] = field(default_factory=list, init=False)

    def uniform(self, index: int) -> float:
        """The random number from [0, 1) for the answer's token `index`; the same at every call."""
        while len(self._uniform) <= index:
            self._uniform.append(float(torch.rand((), generator=self._generator, dtype=torch.float64)))
        return self._uniform[index]

    @cached_property
    def _generator(self) -> torch.Generator:
        """Made on first use, as greedy requests need none."""
        generator, seed = torch.Generator(), self.params.seed
        if seed is not None:
            generator.manual_seed(seed % 2**64)  # torch takes 64 bits, JSON has no limit
        else:
            generator.seed()
        return generator


@dataclass(slots=True)
class CachedPrefix:
    """A request's use of the prefix cache.

    hashes: of the first full blocks, see `prefix_hashes.py`. is_matched: they were looked up since the prompt is known.
    num_tokens: prompt tokens whose KV was in the cache when the request began.
    scope: the digest of the request's cache scope.
    """

    hashes: list[bytes] = field(default_factory=list)
    is_matched: bool = False
    num_tokens: int = 0
    scope: bytes = b""


@dataclass(slots=True)
class RequestTimings:
    """The time that a request spends in the engine: durations in seconds, and moments of `time.perf_counter`.

    ready_at: when all that its prompt needs was here, KV blocks and embeddings included.
    """

    land_s: float = 0.0
    prefill_s: float = 0.0
    submitted_at: float = field(default_factory=time.perf_counter)
    ready_at: float | None = None
    first_token_at: float | None = None

    def token_sampled(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def snapshot(self, num_cached_tokens: int) -> EngineTimings:
        first = self.first_token_at
        return EngineTimings(
            land_ms=self.land_s * 1000,
            prefill_ms=self.prefill_s * 1000,
            decode_ms=(time.perf_counter() - first) * 1000 if first is not None else 0.0,
            ttft_ms=(first - self.submitted_at) * 1000 if first is not None else 0.0,
            num_cached_tokens=num_cached_tokens,
        )
