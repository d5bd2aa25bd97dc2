"""What the frontends hand to the engine and what comes back."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch

# The quotients of smaller temperatures overflow, and the best token already has all of the probability.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    temperature 0 is greedy; top_k 0 keeps all tokens; max_tokens None means what the context leaves.
    logprobs: None for none, 0 for the sampled token's, n for also the n most probable (20 at most).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, so that nothing is drawn."""
        return self.temperature < _GREEDY_BELOW

    def is_last(self, first_token_id: int) -> bool:
        """Whether an answer that begins with this token ends with it."""
        return self.max_tokens == 1 or first_token_id in self.stop_token_ids


@dataclass(frozen=True)
class MediaSpan:
    """A run of placeholder positions that take consecutive rows of one media item.

    start: first position in the prompt; length: positions; first_row: row of the item that goes to `start`.
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

    token_ids: N ids, media positions hold the placeholder id.
    positions_3N: M-RoPE positions (t, h, w), int64 on the CPU.
    next_position: M-RoPE position of the first generated token (all three axes).
    spans: in order of `start`.
    content_hashes: of each media item, empty where it is not known: equal ones have equal rows.
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
        """Those that overlap positions [start, stop)."""
        # In order of their starts, and so of their stops: a video has hundreds.
        first = bisect_right(self.spans, start, key=lambda span: span.stop)
        return list(takewhile(lambda span: span.start < stop, self.spans[first:]))

    def items_from(self, start: int) -> set[int]:
        """Media items with rows at position `start` or behind it."""
        return {span.item_index for span in self.spans if span.stop > start}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities before temperature, top-p and top-k; `top` most probable first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(NamedTuple):
    """One generated token. `finish_reason` is set on the last: "stop" (a stop token, included here) or "length"."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


class EngineTimings(NamedTuple):
    """Milliseconds this request spent in the engine; `ttft_ms` counts from submit to the first token.

    num_cached_tokens: tokens of the prompt whose keys and values were there already.
    """

    land_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    num_cached_tokens: int = 0
