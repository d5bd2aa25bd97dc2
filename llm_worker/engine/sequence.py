"""One request inside the engine: what is known of its prompt, what is computed, and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from embedding_transport.errors import InternalError, VitrineError
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.prefix_hashes import extend_prefix_hashes
from llm_worker.engine.request import EngineTimings, ExpandedPrompt, MediaSpan, SamplingParams, TokenOutput
from llm_worker.models.paged_attention import BlockTable

Deliver = Callable[[TokenOutput | VitrineError, EngineTimings], None]
RequestRows = Callable[[list[int]], None]
RequestKv = Callable[[int], None]


@dataclass(eq=False)
class Sequence:
    """Owned by the engine's thread.

    token_ids: the text in front of the first media item, then the whole prompt, then what was generated, as far as the
    host knows it. num_in_flight: tokens behind them that steps in flight sample; row: of the token pool, for the last.
    num_computed: tokens whose KV is in the cache, or will be when the steps that have started are through.
    num_settled: of them, those whose steps are through. attempt: how often what was computed was lost.
    matched: what the cache knows of this prompt was looked up. num_cached: tokens of the prompt that it had at first.
    preempted: it was computed before, and lost it.
    coming: media items whose rows somebody is about to hand over; request_rows asks for others.
    request_kv: asks for the prompt's KV from a token on, if that is computed elsewhere; None where it is computed here.
    kv: its rows, until they have landed; kv_coming: they were asked for; kv_first: from this token on.
    keep_kv: its blocks are kept when it has its last token.
    """

    request_id: str
    arrival: int
    token_ids: list[int]
    sampling: SamplingParams
    deliver: Deliver
    request_rows: RequestRows
    request_kv: RequestKv | None = None
    prompt: ExpandedPrompt | None = None
    rows: dict[int, EmbeddingRows] = field(default_factory=dict)
    blocks: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    num_settled: int = 0
    row: int = 0
    num_in_flight: int = 0
    attempt: int = 0
    max_total_tokens: int = 0
    matched: bool = False
    num_cached: int = 0
    preempted: bool = False
    coming: set[int] = field(default_factory=set)
    kv: EmbeddingRows | None = None
    kv_coming: bool = False
    kv_first: int = 0
    keep_kv: bool = False
    num_lost_rows: int = 0
    prefix_hashes: list[bytes] = field(default_factory=list)
    finished: bool = False
    land_s: float = 0.0
    prefill_s: float = 0.0
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    _uniform: list[float] = field(default_factory=list, init=False)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids) if self.prompt is not None else len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def waits_for_media(self) -> bool:
        """Whether nothing can be computed of it before the sizes of its media are known."""
        return self.prompt is None and not self.token_ids and self.request_kv is None

    @property
    def is_decoding(self) -> bool:
        """Whether its whole prompt is computed."""
        return self.prompt is not None and self.num_computed >= self.num_prompt_tokens

    @property
    def num_to_hold(self) -> int:
        """Known tokens that need a place in the cache; an answer's last one is never run."""
        return min(self.num_tokens, self.max_total_tokens - 1) if self.is_decoding else self.num_tokens

    @property
    def num_runnable(self) -> int:
        """Tokens that could be computed now: all up to the first media rows that are not here yet."""
        if self.request_kv is not None and not self.is_decoding:
            return 0
        if self.prompt is None:
            # One is kept back: should nothing follow, the last token has yet to run to be sampled from.
            return max(len(self.token_ids) - 1, 0)
        if self.is_decoding:
            return self.num_to_hold
        late = (
            span.start
            for span in self.prompt.spans
            if span.stop > self.num_computed and span.item_index not in self.rows
        )
        return min(late, default=len(self.token_ids))

    def set_prompt(self, prompt: ExpandedPrompt) -> None:
        if prompt.token_ids[: len(self.token_ids)] != self.token_ids:
            raise InternalError(f"the prompt of {self.request_id} does not begin with the text that was prefilled")
        self.prompt = prompt
        self.token_ids = list(prompt.token_ids)
        self.matched = False

    def hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """Of the first blocks, `num_blocks` at most; see `prefix_hashes.py`."""
        extend_prefix_hashes(self.prefix_hashes, self.token_ids, self.prompt, block_size, num_blocks)
        return self.prefix_hashes[:num_blocks]

    def missing_items(self) -> list[int]:
        """Media items that are still to be computed and that nobody is about to hand over; they count as coming now."""
        if self.prompt is None or self.is_decoding or self.request_kv is not None:
            return []
        missing = self.prompt.items_from(self.num_computed) - self.rows.keys() - self.coming
        self.coming |= missing
        return sorted(missing)

    def ask_for_kv(self) -> None:
        """Asks for what is missing of the prompt's KV, unless it is coming."""
        if self.request_kv is None or self.is_decoding or self.kv_coming:
            return
        if self.kv_first > self.num_computed:
            self.release_kv()  # what it goes on from was lost meanwhile
        if self.kv is None:
            self.kv_coming, self.kv_first = True, self.num_computed
            self.request_kv(self.kv_first)

    def spans_in(self, start: int, stop: int) -> list[MediaSpan]:
        """Media spans that overlap tokens [start, stop)."""
        if self.prompt is None or start >= self.num_prompt_tokens:
            return []
        return self.prompt.spans_in(start, stop)

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """M-RoPE positions of tokens [start, stop), [3, stop - start] int64."""
        if self.prompt is None:
            return torch.arange(start, stop).expand(3, -1)
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return self.prompt.positions_3N[:, start:stop]
        first = self.generated_position(max(start, num_prompt))
        generated = torch.arange(first, first + stop - max(start, num_prompt)).expand(3, -1)
        if start >= num_prompt:
            return generated
        return torch.cat([self.prompt.positions_3N[:, start:], generated], dim=1)

    def generated_position(self, index: int) -> int:
        """Of the token at `index`, which is behind the prompt, along all three axes."""
        assert self.prompt is not None
        return self.prompt.next_position + index - self.num_prompt_tokens

    def uniform(self, index: int) -> float:
        """What the answer's token `index` is drawn by, from [0, 1); the same however often it is drawn."""
        while len(self._uniform) <= index:
            self._uniform.append(float(torch.rand((), generator=self._generator, dtype=torch.float64)))
        return self._uniform[index]

    @cached_property
    def _generator(self) -> torch.Generator:
        """Made for those that draw."""
        generator, seed = torch.Generator(), self.sampling.seed
        if seed is not None:
            generator.manual_seed(seed % 2**64)  # torch takes 64 bits, JSON has no limit
        else:
            generator.seed()
        return generator

    def go_back(self, num_tokens: int) -> None:
        """Everything behind these tokens is lost, also what steps that have started make of it."""
        self.attempt += 1
        self.num_in_flight = 0
        self.num_computed = min(self.num_computed, num_tokens)
        self.num_settled = min(self.num_settled, num_tokens)

    def give_up(self) -> None:
        """What was computed is lost; media rows that are still here can be used again."""
        self.go_back(0)
        self.matched = False
        self.preempted = True

    def release_landed_rows(self) -> None:
        """Releases the rows of every item whose last row is in the cache, and those of KV that is."""
        assert self.prompt is not None
        self.release_rows(self.rows.keys() - self.prompt.items_from(self.num_settled))
        if self.is_decoding:
            self.release_kv()

    def release_rows(self, items: Iterable[int]) -> None:
        for item_index in list(items):
            self.rows.pop(item_index).release()

    def release_kv(self) -> None:
        if self.kv is not None:
            self.kv.release()
            self.kv = None

    def forget_listener(self) -> None:
        """For one that has finished. Its listener refers to it, too, and is what holds the bytes of all media.

        Together they would stay until a garbage collection, and one of many requests stops all threads for several ms.
        """
        self.deliver = self.request_rows = _ignore
        self.request_kv = None

    def timings(self) -> EngineTimings:
        first = self.first_token_at
        return EngineTimings(
            land_ms=self.land_s * 1000,
            prefill_ms=self.prefill_s * 1000,
            decode_ms=(time.perf_counter() - first) * 1000 if first is not None else 0.0,
            ttft_ms=(first - self.submitted_at) * 1000 if first is not None else 0.0,
            num_cached_tokens=self.num_cached,
        )


def _ignore(*arguments: object) -> None:
    """Nobody is there to be told."""
