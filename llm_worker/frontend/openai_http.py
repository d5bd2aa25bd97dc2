"""The HTTP port, put together, and the routes of OpenAI's API to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aiohttp import web

from vitrine_vlm.llm_worker.frontend.http_headers import AllowedOrigins, request_id, with_request_id
from vitrine_vlm.llm_worker.frontend.openai_answers import AnswerKind, AnswerOptions, AnswerWriter, TokenTexts
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation, completion_to_generations
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest, CompletionBody, CompletionRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import add_body_threads, read_request, with_body, with_template
from vitrine_vlm.llm_worker.frontend.responses_route import ResponsesRoute
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.frontend.service_routes import ServiceRoutes
from vitrine_vlm.llm_worker.frontend.sse_stream import SseStream
from vitrine_vlm.llm_worker.frontend.token_routes import TokenRoutes
from vitrine_vlm.llm_worker.generation.events import AnswerEvent, GenerationEvent, GenerationRequest
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.generation.several_answers import generate_answers
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker, RunningRequest
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.http_access import add_access
from vitrine_vlm.service_runtime.http_errors import error_body, errors_as_openai
from vitrine_vlm.service_runtime.http_requests import traced


class OpenAiHttp:
    """Handlers of the worker's HTTP port. `open` is called once the model is loaded; until then /ready answers 503.

    Args:
        readiness: whether requests can be served, and why not.
        origins: whose pages may call the port from a browser.
        allow_cache_reset: whether clients may empty the prefix cache.
        access: who may call it; by default all.
        serves_metrics: whether /metrics is on this port.
    """

    def __init__(
        self,
        metrics: LlmMetrics,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        requests: RequestTracker,
        origins: frozenset[str] = frozenset(),
        allow_cache_reset: bool = False,
        access: Access | None = None,
        serves_metrics: bool = True,
    ) -> None:
        self._access = access or Access()
        self._requests = requests
        self._models = ServedModels()
        self._origins = AllowedOrigins(origins)
        self._other_routes = (
            self._models,
            TokenRoutes(self._models, metrics),
            ResponsesRoute(self._models, requests, metrics),
            ServiceRoutes(metrics, readiness, self._models, allow_cache_reset, serves_metrics),
        )
        self._metrics = metrics

    def open(self, served: ServedModel) -> None:
        self._models.open(served)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[with_request_id, traced, errors_as_openai])
        add_body_threads(app)
        self._origins.add_to(app)
        add_access(app, self._access)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        for routes in self._other_routes:
            routes.add_to(app)
        return app

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        request = await read_request(ChatRequest, http, self._metrics.count_unused_fields)
        served = self._models.named(request.model)
        prepare = partial(chat_to_generation, request, served.generator.tokenizer, served.defaults, request_id())
        generation = await (with_body if request.chat_template is None else with_template)(http, prepare)
        return await self._answer(http, "chat", request, [generation], served)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        request = await read_request(CompletionRequest, http, self._metrics.count_unused_fields)
        served = self._models.named(request.model)
        prepare = partial(completion_to_generations, request, served.generator.tokenizer, served.defaults, request_id())
        generations = await with_body(http, prepare)
        return await self._answer(http, "completion", request, generations, served)

    async def _answer(
        self,
        http: web.Request,
        kind: AnswerKind,
        request: CompletionBody,
        prompts: Sequence[GenerationRequest],
        served: ServedModel,
    ) -> web.StreamResponse:
        tokenizer = served.generator.tokenizer
        options = AnswerOptions(
            return_token_ids=request.return_token_ids or tokenizer is None,
            prompt_logprobs=request.prompt_logprobs is not None,
            echo=isinstance(request, CompletionRequest) and request.echo,
            num_answers=request.n,
            include_usage=request.stream_options.include_usage,
            continuous_usage=request.stream_options.continuous_usage_stats,
            tools=request.offered_tools if isinstance(request, ChatRequest) else None,
        )
        texts = TokenTexts(tokenizer, request.return_tokens_as_token_ids)
        writer = AnswerWriter(kind, prompts[0].request_id, served.name, texts, options)
        running = self._run(served.generator, prompts, request.n, request.best_of)
        if request.stream:
            return await _stream(SseStream(http), running, writer)
        async with running as events:
            async for event in events:
                writer.add(*_numbered(event))
        return web.json_response(writer.answer())

    def _run(
        self, generator: Generator, prompts: Sequence[GenerationRequest], n: int, best_of: int
    ) -> RunningRequest[GenerationEvent] | RunningRequest[AnswerEvent]:
        # A queue of several answers costs each token another task's turn.
        if len(prompts) == 1 and n == 1 and best_of <= 1:
            return self._requests.track(partial(generator.generate, prompts[0]))
        return self._requests.track(partial(generate_answers, generator, prompts, n, best_of))


async def _stream(
    stream: SseStream, running: RunningRequest[GenerationEvent] | RunningRequest[AnswerEvent], writer: AnswerWriter
) -> web.StreamResponse:
    async with stream.errors_as_events(error_body):
        async with running as events:
            async for event in events:
                for chunk in writer.chunks(*_numbered(event)):
                    await stream.send(chunk)
        if writer.options.include_usage:
            await stream.send(writer.usage_chunk())
        await stream.send_done()
    return stream.response


def _numbered(event: GenerationEvent | AnswerEvent) -> AnswerEvent:
    """The event with its answer's number: the only answer's events come without."""
    return event if isinstance(event, AnswerEvent) else AnswerEvent(0, event)
