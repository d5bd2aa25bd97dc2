"""`/v1/responses`, the default route of several SDKs; without state, as nothing is stored."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from vitrine_vlm.llm_worker.frontend.http_headers import request_id
from vitrine_vlm.llm_worker.frontend.openai_answers import TokenTexts
from vitrine_vlm.llm_worker.frontend.openai_prompt import messages_to_generation, template_messages
from vitrine_vlm.llm_worker.frontend.request_parsing import read_request, with_body
from vitrine_vlm.llm_worker.frontend.responses_answers import ResponseWriter
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.frontend.sse_stream import SseStream
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, GenerationRequest
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.request_tracker import RequestTracker, RunningRequest


class ResponsesRoute:
    def __init__(self, models: ServedModels, requests: RequestTracker, metrics: LlmMetrics) -> None:
        self._models = models
        self._requests = requests
        self._metrics = metrics

    def add_to(self, application: web.Application) -> None:
        application.router.add_post("/v1/responses", self._respond)

    async def _respond(self, http: web.Request) -> web.StreamResponse:
        request = await read_request(ResponsesRequest, http, self._metrics.count_unused_fields)
        served = self._models.named(request.model)
        tokenizer = served.generator.tokenizer
        generation = await with_body(http, partial(_to_generation, request, served, request_id()))
        writer = ResponseWriter(request_id(), served.name, request, generation.sampling, TokenTexts(tokenizer))
        running = self._requests.track(partial(served.generator.generate, generation))
        if request.stream:
            return await _stream(SseStream(http), running, writer)
        deltas: list[Delta] = []
        async with running as events:
            async for event in events:
                if isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Finished):
                    return web.json_response(writer.whole(deltas, event))
        raise RuntimeError("the generation ended without Finished")


def _to_generation(request: ResponsesRequest, served: ServedModel, request_id: str) -> GenerationRequest:
    """
    Raises:
        BadRequest: see `messages_to_generation` and `offered_tools`.
    """
    tools = request.offered_tools
    return messages_to_generation(
        request,
        request.media,
        Chat(template_messages(request.messages), tools.for_template() if tools is not None else []),
        tools,
        request.max_output_tokens,
        served.generator.tokenizer,
        served.defaults,
        f"resp_{request_id}",
    )


async def _stream(
    stream: SseStream, running: RunningRequest[GenerationEvent], writer: ResponseWriter
) -> web.StreamResponse:
    async with stream.errors_as_events(writer.error_event), running as events:
        async for event in events:
            if isinstance(event, Delta):
                # Only now: an error before the first token has a status of its own.
                if not stream.has_begun:
                    for first in writer.first_events():
                        await stream.send(first)
                for each in writer.delta_events(event):
                    await stream.send(each)
            elif isinstance(event, Finished):
                for last in writer.last_events(event):
                    await stream.send(last)
    return stream.response
