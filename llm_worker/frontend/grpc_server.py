"""The worker's gRPC face: a thin servicer over Generator."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import TypeAlias

import grpc

from embedding_transport.errors import BadRequest, EncoderUnavailable
from embedding_transport.grpc_status import abort
from embedding_transport.types import MediaItem, MediaKind
from llm_worker.engine.request import SamplingParams, TokenLogprobs
from llm_worker.frontend.events import Delta, Finished, GenerationRequest, StageTimings, Started
from llm_worker.frontend.openai_http import ServedModel
from llm_worker.metrics import LlmMetrics
from protos.llm.v1 import llm_pb2, llm_pb2_grpc
from service_runtime.grpc_server import ServiceServer
from service_runtime.traces import metadata_carrier, serving_span

SERVICE = llm_pb2.DESCRIPTOR.services_by_name["Llm"].full_name
_MAX_TOP_LOGPROBS = 20
_KINDS: dict[int, MediaKind] = {llm_pb2.MEDIA_KIND_IMAGE: "image", llm_pb2.MEDIA_KIND_VIDEO: "video"}

GenerateContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.GenerateRequest, llm_pb2.GenerateResponse]
PrefillContext: TypeAlias = grpc.aio.ServicerContext[llm_pb2.PrefillRequest, llm_pb2.PrefillResponse]


class LlmServicer(llm_pb2_grpc.LlmServicer):
    """Answers UNAVAILABLE until `open` is called."""

    def __init__(self, metrics: LlmMetrics) -> None:
        self._metrics = metrics
        self._served: ServedModel | None = None

    def open(self, served: ServedModel) -> None:
        self._served = served

    # A coroutine that writes, not a generator: when the client goes away the cancellation is raised inside it.
    async def Generate(self, request: llm_pb2.GenerateRequest, context: GenerateContext) -> None:  # type: ignore[override]
        try:
            served = self._loaded()
            generation = _generation(request.request_id, request.prompt, request.sampling, served)
            with serving_span("generate", metadata_carrier(context.invocation_metadata())):
                await self._generate(generation, served, context)
        except Exception as error:
            await abort(context, error)

    async def Prefill(self, request: llm_pb2.PrefillRequest, context: PrefillContext) -> llm_pb2.PrefillResponse:
        try:
            served = self._loaded()
            request.sampling.max_tokens = 1
            if not request.sampling.HasField("logprobs"):
                request.sampling.logprobs = 0
            generation = _generation(request.request_id, request.prompt, request.sampling, served)
            with serving_span("prefill", metadata_carrier(context.invocation_metadata())):
                delta, finished = await _first_token(self._metrics.watch(served.generator.generate(generation)))
        except Exception as error:
            await abort(context, error)
        return llm_pb2.PrefillResponse(
            num_prompt_tokens=finished.num_prompt_tokens,
            first_token=_logprobs_to_proto(delta.logprobs[0]),
            text=delta.text,
            timings=_timings_to_proto(finished.timings),
        )

    async def _generate(self, generation: GenerationRequest, served: ServedModel, context: GenerateContext) -> None:
        async with aclosing(self._metrics.watch(served.generator.generate(generation))) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = llm_pb2.Started(request_id=generation.request_id, **asdict(event))
                    await context.write(llm_pb2.GenerateResponse(started=started))
                elif isinstance(event, Delta):
                    await context.write(llm_pb2.GenerateResponse(delta=_delta_to_proto(event)))
                else:
                    await context.write(llm_pb2.GenerateResponse(finished=_finished_to_proto(event)))

    def _loaded(self) -> ServedModel:
        if self._served is None:
            raise EncoderUnavailable("the worker is still loading its model: try again when it is SERVING")
        return self._served


class LlmServer(ServiceServer):
    """The worker's gRPC port."""

    def __init__(self, servicer: LlmServicer) -> None:
        super().__init__(SERVICE)
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


def _generation(
    request_id: str, prompt: llm_pb2.Prompt, sampling: llm_pb2.SamplingParams, served: ServedModel
) -> GenerationRequest:
    """
    Raises:
        BadRequest: a prompt or media item without content, or a sampling parameter out of range.
    """
    kind = prompt.WhichOneof("prompt")
    if kind is None:
        raise BadRequest("the prompt is missing: set text or token_ids")
    return GenerationRequest(
        request_id=request_id or uuid.uuid4().hex,
        prompt=prompt.text if kind == "text" else list(prompt.token_ids.ids),
        media=tuple(_media_item(index, item) for index, item in enumerate(prompt.media)),
        sampling=_sampling(sampling, served),
        stop=tuple(sampling.stop),
    )


def _media_item(index: int, item: llm_pb2.MediaItem) -> MediaItem:
    source = item.WhichOneof("source")
    if source is None or item.kind not in _KINDS:
        raise BadRequest(f"media item {index} needs a kind and either url or data")
    return MediaItem(
        _KINDS[item.kind],
        url=item.url if source == "url" else None,
        data=item.data if source == "data" else None,
        video_fps=item.video_fps or None,
    )


def _sampling(sampling: llm_pb2.SamplingParams, served: ServedModel) -> SamplingParams:
    defaults = served.defaults
    temperature = sampling.temperature if sampling.HasField("temperature") else defaults.temperature
    top_p = sampling.top_p if sampling.HasField("top_p") else defaults.top_p
    # Written so that NaN fails, too.
    if not temperature >= 0 or not 0 < top_p <= 1 or sampling.logprobs > _MAX_TOP_LOGPROBS:
        raise BadRequest(
            f"temperature {temperature} must be at least 0, top_p {top_p} in (0, 1] and "
            f"logprobs {sampling.logprobs} at most {_MAX_TOP_LOGPROBS}"
        )
    eos_token_ids = frozenset() if sampling.ignore_eos else defaults.eos_token_ids
    return SamplingParams(
        max_tokens=sampling.max_tokens or None,
        temperature=temperature,
        top_p=top_p,
        top_k=sampling.top_k if sampling.HasField("top_k") else defaults.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop_token_ids=eos_token_ids | frozenset(sampling.stop_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _delta_to_proto(delta: Delta) -> llm_pb2.Delta:
    logprobs = [_logprobs_to_proto(each) for each in delta.logprobs]
    return llm_pb2.Delta(token_ids=delta.token_ids, text=delta.text, logprobs=logprobs)


def _logprobs_to_proto(logprobs: TokenLogprobs) -> llm_pb2.TokenLogprobs:
    return llm_pb2.TokenLogprobs(
        sampled=llm_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[llm_pb2.TokenLogprob(token_id=token_id, logprob=value) for token_id, value in logprobs.top],
    )


def _finished_to_proto(finished: Finished) -> llm_pb2.Finished:
    return llm_pb2.Finished(
        finish_reason=finished.finish_reason,
        num_prompt_tokens=finished.num_prompt_tokens,
        num_completion_tokens=finished.num_completion_tokens,
        num_cached_tokens=finished.num_cached_tokens,
        timings=_timings_to_proto(finished.timings),
    )


def _timings_to_proto(timings: StageTimings) -> llm_pb2.StageTimings:
    return llm_pb2.StageTimings(**asdict(timings))
