"""A request to generate, and the events that answer it, the same for HTTP and gRPC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv
from vitrine_vlm.llm_worker.engine.request import SamplingParams, TokenLogprobs
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import Layout, MediaItem


@dataclass(frozen=True)
class GenerationRequest:
    """A request of any frontend.

    prompt: with one placeholder a media item: text that the client wrote whole, a chat, or token ids.
    stop: strings; the text ends before the first of them.
    include_stop_str_in_output: it ends behind it; a stop token's text is part of it, too.
    skip_special_tokens: the text has none of the tokenizer's special tokens.
    truncate_prompt_tokens: only the last tokens of the prompt are used, this many, or with -1 as many as the context
        holds; None for all.
    grammar_field: where the sampling's grammar stands in the client's request, for errors.
    tool_fields: the same of each tool of a grammar of tools.
    prompt_only: the prompt is computed, for its log-probabilities, and the answer has no tokens.
    scope: what it may share with other requests: KV, layouts, embeddings.
    """

    request_id: str
    prompt: str | ChatText | list[int]
    media: tuple[MediaItem, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    grammar_field: str = "grammar"
    tool_fields: tuple[str, ...] = ()
    prompt_only: bool = False
    scope: CacheScope = field(default_factory=CacheScope)


@dataclass(frozen=True)
class StageTimings:
    """Milliseconds by stage. Stages of different items overlap; each number is that of the slowest item."""

    load_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    ship_ms: float = 0.0
    land_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0


@dataclass(frozen=True)
class Started:
    """The whole prompt is known. prompt_token_ids: with every media item expanded. layouts: of the media items."""

    num_prompt_tokens: int
    num_media_tokens: int
    prompt_token_ids: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)


@dataclass(frozen=True)
class Delta:
    """Tokens since the last delta, and the text that later tokens cannot change."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class PromptLogprobs:
    """Those of the prompt's tokens, where the request asks for them; of the first there is none."""

    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class FirstToken(Delta):
    """The prompt is computed. kv: the KV of its tokens; timings and num_cached_tokens: so far, as in Finished."""

    kv: CachedKv = field(kw_only=True)
    timings: StageTimings = field(kw_only=True)
    num_cached_tokens: int = field(kw_only=True)


@dataclass(frozen=True)
class Finished:
    """finish_reason: "stop" (end token, stop token or stop string) or "length".

    num_cached_tokens: tokens of the prompt whose KV an earlier request had left in the cache.
    """

    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    timings: StageTimings


GenerationEvent: TypeAlias = Started | PromptLogprobs | Delta | Finished


class AnswerEvent(NamedTuple):
    """An event of one of a request's answers."""

    answer: int
    event: GenerationEvent


class Observe(Protocol):
    """Called with each event of a request, and the answer that it belongs to."""

    def __call__(self, event: GenerationEvent, answer: int = 0) -> None: ...
