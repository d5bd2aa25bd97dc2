"""What the engine reports of a request, as values; an `Outbox` takes them to the request's event loop."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv
from vitrine_vlm.llm_worker.engine.request import EngineTimings, TokenOutput


class TokenSampled(NamedTuple):
    """The next token. kv: the prompt's, with the last token of a request that keeps it."""

    output: TokenOutput
    timings: EngineTimings
    kv: CachedKv | None


class RequestFailed(NamedTuple):
    """The request has ended early; no other event follows."""

    error: VitrineError
    timings: EngineTimings


class EmbeddingsNeeded(NamedTuple):
    """Embeddings of these media items are needed that are not to come: they were not announced, or they are lost."""

    items: list[int]


class KvNeeded(NamedTuple):
    """The prompt's KV from this token on is needed: there is room for it now, or it is lost."""

    first_token: int


Event: TypeAlias = TokenSampled | RequestFailed | EmbeddingsNeeded | KvNeeded
