"""The worker's gRPC face: a thin servicer over Generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import TypeAlias

import grpc

from embedding_transport.errors import EncoderUnavailable
from embedding_transport.grpc_status import abort
from llm_worker.frontend.events import Delta, Finished, GenerationRequest, Started
from llm_worker.frontend.openai_http import ServedModel
from llm_worker.frontend.wire import (
    delta_to_proto,
    finished_to_proto,
    generation_from_proto,
    logprobs_to_proto,
    timings_to_proto,
)
from llm_worker.metrics import LlmMetrics
from protos.llm.v1 import llm_pb2, llm_pb2_grpc
from service_runtime.grpc_server import ServiceServer
from service_runtime.running_calls import RunningCalls
from service_runtime.traces import metadata_carrier, serving_span

SERVICE = llm_pb2.DESCRIPTOR.services_by_name["Llm"].full_name

GenerateContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.GenerateRequest, llm_pb2.GenerateResponse]
PrefillContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.PrefillRequest, llm_pb2.PrefillResponse]


class LlmServicer(llm_pb2_grpc.LlmServicer):
    """Answers UNAVAILABLE until `open` is called, and once it drains."""

    def __init__(self, metrics: LlmMetrics) -> None:
        self._metrics = metrics
        self._served: ServedModel | None = None
        self._draining = False
        self._running = RunningCalls()

    def open(self, served: ServedModel) -> None:
        self._served = served

    async def drain(self, timeout_s: float) -> None:
        """Takes no new calls and finishes those under way: for a port that has others that never end."""
        self._draining = True
        await self._running.drained(timeout_s)

    # A coroutine that writes, not a generator: when the client goes away the cancellation is raised inside it.
    async def Generate(self, request: llm_pb2.GenerateRequest, context: GenerateContext) -> None:  # type: ignore[override]
        try:
            served = self._loaded()
            generation = generation_from_proto(request.request_id, request.prompt, request.sampling, served.defaults)
            with self._running.one(), serving_span("generate", metadata_carrier(context.invocation_metadata())):
                await self._generate(generation, served, context)
        except Exception as error:
            await abort(context, error)

    async def Prefill(self, request: llm_pb2.PrefillRequest, context: PrefillContext) -> llm_pb2.PrefillResponse:
        try:
            served = self._loaded()
            request.sampling.max_tokens = 1
            if not request.sampling.HasField("logprobs"):
                request.sampling.logprobs = 0
            generation = generation_from_proto(request.request_id, request.prompt, request.sampling, served.defaults)
            with self._running.one(), serving_span("prefill", metadata_carrier(context.invocation_metadata())):
                delta, finished = await _first_token(served.generator.generate(generation, self._metrics.watch()))
        except Exception as error:
            await abort(context, error)
        return llm_pb2.PrefillResponse(
            num_prompt_tokens=finished.num_prompt_tokens,
            first_token=logprobs_to_proto(delta.logprobs[0]),
            text=delta.text,
            timings=timings_to_proto(finished.timings),
            num_cached_tokens=finished.num_cached_tokens,
        )

    async def _generate(self, generation: GenerationRequest, served: ServedModel, context: GenerateContext) -> None:
        async with aclosing(served.generator.generate(generation, self._metrics.watch())) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = llm_pb2.Started(request_id=generation.request_id, **asdict(event))
                    await context.write(llm_pb2.GenerateResponse(started=started))
                elif isinstance(event, Delta):
                    await context.write(llm_pb2.GenerateResponse(delta=delta_to_proto(event)))
                else:
                    await context.write(llm_pb2.GenerateResponse(finished=finished_to_proto(event)))

    def _loaded(self) -> ServedModel:
        if self._served is None:
            raise EncoderUnavailable("the worker is still loading its model: try again when it is SERVING")
        if self._draining:
            raise EncoderUnavailable("the worker is shutting down: send the request to another one")
        return self._served


class LlmServer(ServiceServer):
    """The worker's gRPC port."""

    def __init__(self, servicer: LlmServicer, *others: str) -> None:
        """
        Args:
            others: services whose handlers are added elsewhere.
        """
        super().__init__(SERVICE, *others)
        llm_pb2_grpc.add_LlmServicer_to_server(servicer, self.grpc)


async def _first_token(events: AsyncGenerator[Started | Delta | Finished]) -> tuple[Delta, Finished]:
    delta: Delta | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                delta = event
            elif isinstance(event, Finished) and delta is not None:
                return delta, event
    raise RuntimeError("the generation ended without a token")
