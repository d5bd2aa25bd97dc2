"""The HTTP port, put together, and the routes of OpenAI's API to text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from aiohttp import web

from vitrine_vlm.llm_worker.frontend.event_stream import EventStream
from vitrine_vlm.llm_worker.frontend.http_headers import AllowedOrigins, request_id, with_request_id
from vitrine_vlm.llm_worker.frontend.openai_answers import AnswerKind, AnswerOptions, AnswerWriter
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation, completion_to_generation
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest, CompletionBody, CompletionRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import read_request
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.frontend.service_routes import ServiceRoutes
from vitrine_vlm.llm_worker.frontend.token_routes import TokenRoutes
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, GenerationRequest, Started
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.service_runtime.http_errors import errors_as_openai
from vitrine_vlm.service_runtime.http_requests import MAX_BODY_BYTES, traced


class OpenAiHttp:
    """Handlers of the worker's HTTP port. `open` is called once the model is loaded; until then /ready answers 503.

    Args:
        readiness: whether requests can be served, and why not.
        origins: whose pages may call the port from a browser.
        allow_cache_reset: whether clients may empty the prefix cache.
    """

    def __init__(
        self,
        metrics: LlmMetrics,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        requests: RequestTracker,
        origins: frozenset[str] = frozenset(),
        allow_cache_reset: bool = False,
    ) -> None:
        self._requests = requests
        self._models = ServedModels()
        self._origins = AllowedOrigins(origins)
        self._other_routes = (
            self._models,
            TokenRoutes(self._models, metrics),
            ServiceRoutes(metrics, readiness, self._models, allow_cache_reset),
        )
        self._metrics = metrics

    def open(self, served: ServedModel) -> None:
        self._models.open(served)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[with_request_id, traced, errors_as_openai])
        self._origins.add_to(app)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        for routes in self._other_routes:
            routes.add_to(app)
        return app

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        request = await read_request(ChatRequest, http, self._metrics.count_unused_fields)
        served = self._models.named(request.model)
        generation = chat_to_generation(request, served.generator.tokenizer, served.defaults, request_id())
        return await self._answer(http, "chat", request, generation, served)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        request = await read_request(CompletionRequest, http, self._metrics.count_unused_fields)
        served = self._models.named(request.model)
        generation = completion_to_generation(request, served.defaults, request_id())
        return await self._answer(http, "completion", request, generation, served)

    async def _answer(
        self,
        http: web.Request,
        kind: AnswerKind,
        request: CompletionBody,
        generation: GenerationRequest,
        served: ServedModel,
    ) -> web.StreamResponse:
        tokenizer = served.generator.tokenizer
        options = AnswerOptions(
            return_token_ids=request.return_token_ids or tokenizer is None,
            tokens_as_ids=request.return_tokens_as_token_ids or tokenizer is None,
            include_usage=request.stream_options.include_usage,
            continuous_usage=request.stream_options.continuous_usage_stats,
        )
        writer = AnswerWriter(kind, generation.request_id, served.name, tokenizer, options)
        running = self._requests.track(partial(served.generator.generate, generation))
        if request.stream:
            return await _stream(EventStream(http), running, writer)
        deltas: list[Delta] = []
        async with running as events:
            async for event in events:
                if isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Finished):
                    return web.json_response(writer.answer(deltas, event))
        raise RuntimeError("the generation ended without Finished")


async def _stream(
    stream: EventStream,
    running: AbstractAsyncContextManager[AsyncGenerator[GenerationEvent]],
    writer: AnswerWriter,
) -> web.StreamResponse:
    async with stream.errors_as_events():
        async with running as events:
            async for event in events:
                if isinstance(event, Started):
                    writer.start(event)
                elif isinstance(event, Delta):
                    if writer.kind == "chat" and not stream.has_begun:
                        await stream.send(writer.role_chunk())
                    await stream.send(writer.delta_chunk(event, None))
                else:
                    # In a chunk of its own, as OpenAI does: the last token would otherwise wait for it, a whole step.
                    await stream.send(writer.delta_chunk(Delta(), event.finish_reason))
                    if writer.options.include_usage:
                        await stream.send(writer.usage_chunk(event))
        await stream.send_done()
    return stream.response
