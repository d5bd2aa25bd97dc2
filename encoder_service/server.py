"""The encoder's gRPC face: a thin servicer over EncodeService and RowExporter."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import torch

from embedding_transport.encoder_rpc import SERVICE, encoder_handlers
from embedding_transport.errors import EncoderUnavailable, InternalError, VitrineError
from embedding_transport.exporter import RowExporter
from embedding_transport.grpc_status import abort
from embedding_transport.types import ItemTimings, LayoutEvent
from encoder_service.codec import failed_to_proto, item_from_proto, layout_to_proto
from encoder_service.metrics import EncoderMetrics
from encoder_service.service import EncodeService, ItemFailed
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from service_runtime.grpc_server import ServiceServer
from service_runtime.logs import set_request_id
from service_runtime.traces import metadata_carrier, serving_span

_log = logging.getLogger(__name__)

Wire: TypeAlias = encoder_pb2.EncodeResponse | bytes
EncodeContext: TypeAlias = grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, Wire]
ConnectContext: TypeAlias = grpc.aio.ServicerContext[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]


@dataclass(frozen=True)
class Serving:
    """What there is once the model is loaded."""

    description: encoder_pb2.DescribeResponse
    service: EncodeService
    exporter: RowExporter
    stats: Callable[[], encoder_pb2.GetStatsResponse]


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Answers UNAVAILABLE until `open` is called and, for Encode, after `start_draining`."""

    def __init__(self, metrics: EncoderMetrics) -> None:
        self._metrics = metrics
        self._serving: Serving | None = None
        self._draining = False
        self._num_encoding = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, serving: Serving) -> None:
        self._serving = serving

    def start_draining(self) -> None:
        """Refuses new Encode calls; those under way go on."""
        self._draining = True

    async def idle(self) -> None:
        """Returns when no Encode call is under way."""
        await self._idle.wait()

    # Connect and Encode are coroutines that write, not generators: when a peer goes away the cancellation is raised
    # inside them, so that what they hold is given back at once and not when a generator is collected.

    async def Describe(
        self,
        request: encoder_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.DescribeRequest, encoder_pb2.DescribeResponse],
    ) -> encoder_pb2.DescribeResponse:
        try:
            return self._loaded().description
        except VitrineError as error:
            await abort(context, error)

    async def Connect(  # type: ignore[override]
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest], context: ConnectContext
    ) -> None:
        try:
            async for response in self._loaded().exporter.connect(requests):
                await context.write(response)
        except Exception as error:
            await abort(context, error)

    async def Encode(  # type: ignore[override]
        self, request: encoder_pb2.EncodeRequest, context: EncodeContext
    ) -> None:
        outcome = "cancelled"
        set_request_id(request.request_id)
        caller = metadata_carrier(context.invocation_metadata())
        try:
            with self._count_encoding(), serving_span("encode", caller, **{"vitrine.num_items": len(request.items)}):
                await self._encode(request, context)
            outcome = "ok"
        except Exception as error:
            outcome = error.code if isinstance(error, VitrineError) else InternalError.code
            await abort(context, error)
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def Release(
        self,
        request: encoder_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.ReleaseRequest, encoder_pb2.ReleaseResponse],
    ) -> encoder_pb2.ReleaseResponse:
        try:
            num_released, num_unknown = self._loaded().exporter.release(request.session_id, request.lease_ids)
        except VitrineError as error:
            await abort(context, error)
        return encoder_pb2.ReleaseResponse(num_released=num_released, num_unknown=num_unknown)

    async def GetStats(
        self,
        request: encoder_pb2.GetStatsRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.GetStatsRequest, encoder_pb2.GetStatsResponse],
    ) -> encoder_pb2.GetStatsResponse:
        try:
            return self._loaded().stats()
        except VitrineError as error:
            await abort(context, error)

    async def _encode(self, request: encoder_pb2.EncodeRequest, context: EncodeContext) -> None:
        serving = self._loaded()
        if self._draining:
            raise EncoderUnavailable("the encoder is shutting down: send the request to another one")
        items = [item_from_proto(index, message) for index, message in enumerate(request.items)]
        leases: set[int] = set()
        undelivered: set[int] = set()

        async def ship(item_index: int, rows_TW: torch.Tensor, timings: ItemTimings) -> AsyncGenerator[Wire, None]:
            async for response in serving.exporter.export(request.session_id, item_index, rows_TW, timings):
                if isinstance(response, encoder_pb2.EncodeResponse) and response.HasField("ready"):
                    leases.add(response.ready.lease.lease_id)
                    undelivered.add(response.ready.lease.lease_id)
                yield response

        left_s = context.time_remaining()
        deadline = math.inf if left_s is None else time.monotonic() + left_s
        try:
            async with aclosing(serving.service.encode(items, ship, request.tenant, deadline)) as events:
                async for event in events:
                    if isinstance(event, LayoutEvent):
                        await context.write(layout_to_proto(event))
                    elif isinstance(event, ItemFailed):
                        code, reason = event.error.code, event.error
                        _log.info("item %d: %s: %s", event.item_index, code, reason)
                        await context.write(failed_to_proto(event))
                    else:
                        await context.write(event)
                        if isinstance(event, encoder_pb2.EncodeResponse):
                            undelivered.discard(event.ready.lease.lease_id)
        except asyncio.CancelledError:
            # The peer has given the request up. Some of its leases may still be on their way, where nobody takes them.
            undelivered |= leases
            raise
        finally:
            # The peer will never hear of these leases, so it cannot release them.
            if undelivered:
                serving.exporter.release(request.session_id, sorted(undelivered))

    def _loaded(self) -> Serving:
        if self._serving is None:
            raise EncoderUnavailable("the encoder is still loading its model: try again when it is SERVING")
        return self._serving

    @contextmanager
    def _count_encoding(self) -> Iterator[None]:
        self._num_encoding += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_encoding -= 1
            if not self._num_encoding:
                self._idle.set()


class EncoderServer(ServiceServer):
    """The encoder's listening port."""

    def __init__(self, servicer: EncoderServicer) -> None:
        super().__init__(SERVICE)
        self.grpc.add_generic_rpc_handlers((encoder_handlers(servicer),))
