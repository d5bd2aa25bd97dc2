"""The Llm service: a thin servicer over Generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TypeAlias

import grpc

from vitrine_vlm.embedding_transport.wire.grpc_access import GrpcAccess
from vitrine_vlm.embedding_transport.wire.grpc_status import abort, logged_call, send
from vitrine_vlm.errors import WorkerUnavailable
from vitrine_vlm.llm_worker.generation.events import (
    Delta,
    Finished,
    GenerationEvent,
    GenerationRequest,
    PromptLogprobs,
    Started,
)
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.generation.several_answers import generate_answers
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.llm_worker.wire import (
    checked_salt,
    delta_to_proto,
    finished_to_proto,
    generation_from_proto,
    logprobs_to_proto,
    prompt_logprobs_to_proto,
    started_to_proto,
    timings_to_proto,
)
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.access_log import report
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS, PortLimits
from vitrine_vlm.service_runtime.tenants import CacheScope, current_tenant
from vitrine_vlm.service_runtime.traces import metadata_carrier, serving_span

SERVICE = llm_pb2.DESCRIPTOR.services_by_name["Llm"].full_name

GenerateContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.GenerateRequest, llm_pb2.GenerateResponse]
PrefillContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.PrefillRequest, llm_pb2.PrefillResponse]


class LlmServicer(llm_pb2_grpc.LlmServicer):
    """Answers UNAVAILABLE until `open` is called."""

    def __init__(self, requests: RequestTracker) -> None:
        self._requests = requests
        self._served: ServedModel | None = None

    def open(self, served: ServedModel) -> None:
        self._served = served

    # A coroutine that writes, not a generator: a cancellation by the client is raised inside a coroutine.
    async def Generate(self, request: llm_pb2.GenerateRequest, context: GenerateContext) -> None:  # type: ignore[override]
        try:
            with (
                serving_span("generate", metadata_carrier(context.invocation_metadata())),
                logged_call("Generate"),
            ):
                served = self._loaded()
                generation = _generation(request, served)
                if max(request.n, request.best_of) > 1:
                    answers = partial(generate_answers, served.generator, [generation], request.n, request.best_of)
                    async with self._requests.track(answers) as answer_events:
                        async for answer, event in answer_events:
                            await _write_event(event, answer, generation.request_id, context)
                else:
                    async with self._requests.track(partial(served.generator.generate, generation)) as events:
                        async for event in events:
                            await _write_event(event, 0, generation.request_id, context)
        except Exception as error:
            await abort(context, error)

    async def Prefill(self, request: llm_pb2.PrefillRequest, context: PrefillContext) -> llm_pb2.PrefillResponse:
        try:
            with serving_span("prefill", metadata_carrier(context.invocation_metadata())), logged_call("Prefill"):
                served = self._loaded()
                request.sampling.max_tokens = 1
                request.sampling.min_tokens = min(request.sampling.min_tokens, 1)
                if not request.sampling.HasField("logprobs"):
                    request.sampling.logprobs = 0
                generation = _generation(request, served)
                async with self._requests.track(partial(served.generator.generate, generation)) as events:
                    delta, finished = await _first_token(events)
        except Exception as error:
            await abort(context, error)
        return llm_pb2.PrefillResponse(
            num_prompt_tokens=finished.num_prompt_tokens,
            first_token=logprobs_to_proto(delta.logprobs[0]),
            text=delta.text,
            timings=timings_to_proto(finished.timings),
            num_cached_tokens=finished.num_cached_tokens,
        )

    def _loaded(self) -> ServedModel:
        if self._served is None:
            raise WorkerUnavailable("the worker is still loading its model: try again when it is SERVING")
        report(model=self._served.name)
        return self._served


class LlmServer(ServiceServer):
    """The worker's gRPC port."""

    def __init__(
        self,
        servicer: LlmServicer,
        *others: str,
        access: Access | None = None,
        limits: PortLimits = DEFAULT_LIMITS,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """
        Args:
            others: names of further services of this port, whose handlers the caller adds.
            access: who may call it; by default all.
            limits, interceptors: see ServiceServer.
        """
        interceptors = [GrpcAccess(access or Access()), *interceptors]
        super().__init__(SERVICE, *others, limits=limits, interceptors=interceptors)
        llm_pb2_grpc.add_LlmServicer_to_server(servicer, self.grpc)


def _generation(request: llm_pb2.GenerateRequest | llm_pb2.PrefillRequest, served: ServedModel) -> GenerationRequest:
    scope = CacheScope(current_tenant(), checked_salt(request.cache_salt))
    return generation_from_proto(request.request_id, request.prompt, request.sampling, served.defaults, scope)


async def _write_event(event: GenerationEvent, answer: int, request_id: str, context: GenerateContext) -> None:
    if isinstance(event, Started):
        response = llm_pb2.GenerateResponse(started=started_to_proto(event, request_id))
    elif isinstance(event, PromptLogprobs):
        response = llm_pb2.GenerateResponse(prompt_logprobs=prompt_logprobs_to_proto(event))
    elif isinstance(event, Delta):
        response = llm_pb2.GenerateResponse(delta=delta_to_proto(event))
    else:
        response = llm_pb2.GenerateResponse(finished=finished_to_proto(event))
    response.answer = answer
    await send(context, response)


async def _first_token(events: AsyncGenerator[GenerationEvent]) -> tuple[Delta, Finished]:
    delta: Delta | None = None
    async for event in events:
        if isinstance(event, Delta):
            delta = event
        elif isinstance(event, Finished) and delta is not None:
            return delta, event
    raise RuntimeError("the generation ended without a token")
