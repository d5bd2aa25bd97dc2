"""The HTTP port: the OpenAI-compatible API, probes and metrics."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vitrine_vlm.errors import UnknownModel, WorkerUnavailable, as_vitrine_error
from vitrine_vlm.llm_worker.frontend.openai_answers import AnswerKind, AnswerWriter
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation, completion_to_generation
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest, CompletionRequest, parse_request
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, GenerationRequest
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.service_runtime.http_errors import error_body, errors_as_openai, is_client_gone
from vitrine_vlm.service_runtime.http_requests import MAX_BODY_BYTES, json_body, traced


class OpenAiHttp:
    """Handlers of the worker's HTTP port. `open` is called once the model is loaded; until then /ready answers 503."""

    def __init__(
        self, metrics: LlmMetrics, readiness: Callable[[], tuple[bool, dict[str, Any]]], requests: RequestTracker
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._requests = requests
        self._served: ServedModel | None = None
        self._created = int(time.time())

    def open(self, served: ServedModel) -> None:
        self._served = served

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[traced, errors_as_openai])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._prometheus)
        return app

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        request = parse_request(ChatRequest, await json_body(http))
        served = self._model(request.model)
        generation = chat_to_generation(request, served.generator.tokenizer, served.defaults)
        return await self._answer(http, "chat", request, generation, served)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        request = parse_request(CompletionRequest, await json_body(http))
        served = self._model(request.model)
        generation = completion_to_generation(request, served.defaults)
        return await self._answer(http, "completion", request, generation, served)

    async def _models(self, http: web.Request) -> web.Response:
        model = {"id": self._loaded().name, "object": "model", "created": self._created, "owned_by": "vitrine"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, http: web.Request) -> web.Response:
        ready, details = self._readiness()
        return web.json_response({"ready": ready, **details}, status=200 if ready else 503)

    async def _prometheus(self, http: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _loaded(self) -> ServedModel:
        if self._served is None:
            raise WorkerUnavailable("the worker is still loading its model: try again when /ready answers 200")
        return self._served

    def _model(self, name: str) -> ServedModel:
        served = self._loaded()
        if name != served.name:
            raise UnknownModel(f"the model {name!r} is not served here: send {served.name!r}, as in /v1/models")
        return served

    async def _answer(
        self,
        http: web.Request,
        kind: AnswerKind,
        request: ChatRequest | CompletionRequest,
        generation: GenerationRequest,
        served: ServedModel,
    ) -> web.StreamResponse:
        tokenizer = served.generator.tokenizer
        return_token_ids = request.return_token_ids or tokenizer is None
        writer = AnswerWriter(kind, generation.request_id, served.name, tokenizer, return_token_ids)
        running = self._requests.track(partial(served.generator.generate, generation))
        if request.stream:
            return await _stream(http, running, writer, request.include_usage)
        deltas: list[Delta] = []
        async with running as events:
            async for event in events:
                if isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Finished):
                    return web.json_response(writer.answer(deltas, event))
        raise RuntimeError("the generation ended without Finished")


async def _stream(
    http: web.Request,
    running: AbstractAsyncContextManager[AsyncGenerator[GenerationEvent]],
    writer: AnswerWriter,
    include_usage: bool,
) -> web.StreamResponse:
    """Streams server-sent events. An error before the first token is raised, with a status; later ones are events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        async with running as events:
            async for event in events:
                if isinstance(event, Delta):
                    if not response.prepared:
                        await response.prepare(http)
                        if writer.kind == "chat":
                            await _send(response, writer.role_chunk())
                    await _send(response, writer.delta_chunk(event, None))
                elif isinstance(event, Finished):
                    # In a chunk of its own, as OpenAI does: the last token would otherwise wait for it, a whole step.
                    await _send(response, writer.delta_chunk(Delta(), event.finish_reason))
                    if include_usage:
                        await _send(response, writer.usage_chunk(event))
        await response.write(b"data: [DONE]\n\n")
    except Exception as error:
        if not response.prepared:
            raise
        if not is_client_gone(http, error):
            await _send(response, error_body(as_vitrine_error(error)))
    return response


async def _send(response: web.StreamResponse, body: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")
