"""The engine's events of a request, as values; an `Outbox` delivers them on the request's event loop."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv
from vitrine_vlm.llm_worker.engine.request import EngineTimings, TokenLogprobs, TokenOutput


class TokenSampled(NamedTuple):
    """The next token.

    kv: the prompt's KV, with the last token of a request that keeps it.
    prompt_logprobs: with the first token of a request that asks for them.
    """

    output: TokenOutput
    timings: EngineTimings
    kv: CachedKv | None
    prompt_logprobs: list[TokenLogprobs] | None = None


class RequestFailed(NamedTuple):
    """The request has ended early; no other event follows."""

    error: VitrineError
    timings: EngineTimings


class EmbeddingsNeeded(NamedTuple):
    """Embeddings of these media items are needed: they were not announced, or they were lost."""

    items: list[int]


class KvNeeded(NamedTuple):
    """The prompt's KV from this token on is needed: there are blocks for it now, or it was lost."""

    first_token: int


Event: TypeAlias = TokenSampled | RequestFailed | EmbeddingsNeeded | KvNeeded
