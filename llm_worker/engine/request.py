"""The values that pass between the frontends and the engine: sampling, prompts, tokens, timings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

import torch

from vitrine_vlm.llm_worker.engine.grammar import Grammar

# Logits divided by smaller temperatures overflow, and the best token has all of the probability anyway.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `check_sampling` has the ranges.

    temperature: 0 is greedy. top_k: 0 keeps all tokens. max_tokens: None for as many as the context leaves.
    logprobs: None for none, 0 for the sampled token's, n for also the n most probable.
    min_p: smallest probability of a token, as a part of the most probable one's; 0 keeps all.
    min_tokens: stop tokens are not chosen before the answer has as many.
    presence_penalty: subtracted from the logits of tokens that the answer has. frequency_penalty: likewise, as often as
        it has them. repetition_penalty: divides positive logits, and multiplies others, of tokens that prompt or answer
        have.
    logit_bias: added to the logits of these tokens.
    prompt_logprobs: as `logprobs`, of every prompt token but the first.
    bad_words: token sequences that the answer never has. allowed_token_ids: the only tokens it may have; None for all.
    grammar: what the answer must look like; None for free text. It is stronger than what else excludes tokens, and an
        answer ends where nothing can follow in it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: frozenset[int] | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is chosen, without a random number."""
        return self.temperature < _GREEDY_BELOW

    @cached_property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far by their number."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @cached_property
    def bad_tokens(self) -> list[int]:
        """Bad words of one token, which are never chosen."""
        return [word[0] for word in self.bad_words if len(word) == 1]

    @cached_property
    def bad_phrases(self) -> list[tuple[int, ...]]:
        """Bad words of several tokens."""
        return [word for word in self.bad_words if len(word) > 1]

    @cached_property
    def has_bias(self) -> bool:
        """Whether the same numbers are added to the logits of every token of the answer."""
        return bool(self.logit_bias or self.bad_tokens) or self.allowed_token_ids is not None

    @cached_property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is chosen, also the most probable one."""
        return self.has_penalties or self.has_bias or self.excludes_tokens or self.grammar is not None

    @cached_property
    def excludes_tokens(self) -> bool:
        """Whether tokens are excluded by more than a grammar."""
        return bool(self.bad_words) or self.allowed_token_ids is not None or self.min_tokens > 0

    def is_last(self, first_token_id: int) -> bool:
        """Whether this first token of an answer is also its last."""
        return self.max_tokens == 1 or first_token_id in self.stop_token_ids

    def first_token_only(self) -> SamplingParams:
        """The same first token, and no other."""
        return replace(self, max_tokens=1, min_tokens=min(self.min_tokens, 1))


@dataclass(frozen=True)
class MediaSpan:
    """A run of placeholders for consecutive embeddings of one media item.

    start: first position in the prompt; length: positions; first_row: row of the item's embeddings for `start`.
    An image is one span; a timestamped video is one span a temporal patch.
    """

    item_index: int
    start: int
    length: int
    first_row: int

    @property
    def stop(self) -> int:
        """The position behind the last."""
        return self.start + self.length


@dataclass(frozen=True)
class ExpandedPrompt:
    """The whole prompt, once every media item has a layout.

    token_ids: N ids, with placeholder ids at media positions.
    positions_3N: M-RoPE positions (t, h, w), int64 on the CPU.
    next_position: M-RoPE position of the first generated token (all three axes).
    spans: in order of `start`.
    content_hashes: of each media item, empty where unknown; items with equal ones have equal embeddings.
    """

    token_ids: list[int]
    positions_3N: torch.Tensor
    next_position: int
    spans: tuple[MediaSpan, ...] = ()
    content_hashes: tuple[bytes, ...] = ()

    @property
    def num_media_tokens(self) -> int:
        return sum(span.length for span in self.spans)

    def spans_in(self, start: int, stop: int) -> list[MediaSpan]:
        """The spans that overlap positions [start, stop)."""
        # By bisection, as the spans are in order of their starts and stops: a video has hundreds.
        first = bisect_right(self.spans, start, key=lambda span: span.stop)
        return list(takewhile(lambda span: span.start < stop, self.spans[first:]))

    def items_from(self, start: int) -> set[int]:
        """Media items with embeddings at position `start` or behind it."""
        return {span.item_index for span in self.spans if span.stop > start}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any sampling parameter.

    top: token ids and theirs, most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(NamedTuple):
    """One generated token. `finish_reason` is set on the last: "stop" or "length".

    Before "stop" comes a stop token, included here, or the token behind which a grammar allows no other."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


class EngineTimings(NamedTuple):
    """Milliseconds this request spent in the engine; `ttft_ms` counts from submit to the first token.

    num_cached_tokens: prompt tokens whose KV was in the cache.
    """

    land_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    num_cached_tokens: int = 0
