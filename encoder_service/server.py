"""The encoder's gRPC servicer: a thin layer over EncodeService and RowExporter."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Self, TypeAlias

import grpc
import torch

from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.shipping.async_pool_write import AsyncPoolWrite
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import SERVICE, encoder_handlers
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules
from vitrine_vlm.embedding_transport.shipping.session_rpc import ReleaseContext, SessionServicer, check_release
from vitrine_vlm.embedding_transport.wire.grpc_status import abort, logged_call, send
from vitrine_vlm.embedding_transport.wire.message_bounds import WINDOW_NBYTES
from vitrine_vlm.embedding_transport.wire.messages import layout_to_proto
from vitrine_vlm.embedding_transport.wire.pieces_context import takes_pieces
from vitrine_vlm.embedding_transport.wire.request_pieces import MAX_MESSAGE_NBYTES, first_request, read_files
from vitrine_vlm.encoder_service.codec import check_names, failed_to_proto, item_from_proto
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.errors import EncoderUnavailable, InternalError, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.access_log import report, report_more, report_slowest
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, ReservedBytes
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.logs import harmless, set_request_id
from vitrine_vlm.service_runtime.peers import peer_of
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS, PortLimits
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.traces import metadata_carrier, serving_span
from vitrine_vlm.types import ItemTimings, Layout, MediaItem

_log = logging.getLogger(__name__)

Wire: TypeAlias = encoder_pb2.EncodeResponse | bytes
EncodeContext: TypeAlias = grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, Wire]


@dataclass(frozen=True)
class ServiceState:
    """What the servicer serves from, once the model is loaded.

    description: the answer to Describe; stats: makes the answer to GetStats. row_nbytes: bytes of one row.
    """

    description: encoder_pb2.DescribeResponse
    service: EncodeService
    exporter: RowExporter
    stats: Callable[[], encoder_pb2.GetStatsResponse]
    row_nbytes: int


@dataclass(frozen=True)
class _Call:
    """What an EncodeRequest asks for."""

    items: list[MediaItem]
    session_id: str
    tenant: str
    layout_only: bool
    compute_ahead: bool
    call_id: int

    @classmethod
    def of(cls, request: encoder_pb2.EncodeRequest, state: ServiceState, files: Sequence[bytes]) -> Self:
        """
        Args:
            files: those that came in pieces.

        Raises:
            BadRequest, TooManyItems: no items, too many, or one that is malformed; see also `check_names`.
        """
        state.service.check_number(len(request.items))  # before millions of them cost any work
        check_names(request)
        of_items = iter(files)
        items = [item_from_proto(index, message, of_items) for index, message in enumerate(request.items)]
        return cls(
            items,
            request.session_id,
            request.tenant,
            request.layout_only,
            request.compute_ahead,
            request.call_id,
        )


class EncoderServicer(SessionServicer, encoder_pb2_grpc.EncoderServicer):  # type: ignore[misc]
    """Answers UNAVAILABLE until `open` is called.

    Args:
        calls: the Encode calls in flight.
        held: the process's budget, of which rows that are sent as bytes are a part.
        max_request_nbytes: of the files of a request in pieces.
    """

    def __init__(
        self,
        metrics: EncoderMetrics,
        calls: RunningCalls,
        held: ByteBudget,
        max_request_nbytes: int = DEFAULT_LIMITS.max_body_nbytes,
    ) -> None:
        self._max_request_nbytes = max_request_nbytes
        self._joining = asyncio.Lock()
        self._calls = calls
        self._held = held
        self._metrics = metrics
        self._state: ServiceState | None = None

    def open(self, state: ServiceState) -> None:
        """Begins to answer."""
        self._state = state

    async def Describe(
        self,
        request: encoder_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.DescribeRequest, encoder_pb2.DescribeResponse],
    ) -> encoder_pb2.DescribeResponse:
        try:
            with self._calls.track():  # which refuses new peers of an encoder that is ending
                return self._loaded().description
        except VitrineError as error:
            await abort(context, error)

    # A coroutine that writes, too: see SessionServicer.
    async def Encode(  # type: ignore[override]
        self,
        request: encoder_pb2.EncodeRequest,
        context: EncodeContext,
        pieces: AsyncIterator[encoder_pb2.EncodeRequest] | None = None,
    ) -> None:
        outcome = "cancelled"
        set_request_id(request.request_id)
        caller = metadata_carrier(context.invocation_metadata())
        num_items = len(request.items)
        try:
            with (
                serving_span("encode", caller, **{"vitrine.num_items": num_items}),
                logged_call("Encode"),
                self._calls.track(),
            ):
                report(model=self._loaded().description.model, items=num_items)
                files: Sequence[bytes] = ()
                if pieces is not None:
                    self._loaded().service.check_number(num_items)
                    files = await read_files(request, pieces, self._max_request_nbytes, self._joining)
                call = _Call.of(request, self._loaded(), files)
                del request, files  # a whole request has a second copy of the items' bytes
                await self._encode(call, self._loaded(), context)
            outcome = "ok"
        except Exception as error:
            outcome = InternalError.code
            if isinstance(error, VitrineError):
                outcome = error.code
                error.__traceback__ = None  # it would keep what was read, for as long as the rest is discarded
            await abort(context, error)
        finally:
            with harmless("a metric of requests"):
                self._metrics.requests.labels(outcome).inc()

    @takes_pieces(MAX_MESSAGE_NBYTES)
    async def EncodeInPieces(  # type: ignore[override]
        self, requests: AsyncIterator[encoder_pb2.EncodeRequest], context: EncodeContext
    ) -> None:
        try:
            request = await first_request(requests)
        except VitrineError as error:
            await abort(context, error)
        await self.Encode(request, context, requests)

    async def Release(
        self, request: encoder_pb2.ReleaseRequest, context: ReleaseContext
    ) -> encoder_pb2.ReleaseResponse:
        try:
            check_release(request)
            self._loaded().service.release_tickets(request.tickets)
        except VitrineError as error:
            await abort(context, error)
        return await super().Release(request, context)

    async def GetStats(
        self,
        request: encoder_pb2.GetStatsRequest,
        context: grpc.aio.ServicerContext[encoder_pb2.GetStatsRequest, encoder_pb2.GetStatsResponse],
    ) -> encoder_pb2.GetStatsResponse:
        try:
            return self._loaded().stats()
        except VitrineError as error:
            await abort(context, error)

    async def _encode(self, call: _Call, state: ServiceState, context: EncodeContext) -> None:
        left_s = context.time_remaining()
        deadline = math.inf if left_s is None else time.monotonic() + left_s
        with self._held.item() as rows, _Replies(context, state, call, rows) as replies:
            if call.layout_only:
                peer = peer_of(context).name
                await state.service.layouts(call.items, replies, call.tenant, peer, compute_ahead=call.compute_ahead)
            else:
                await state.service.encode(call.items, replies, call.tenant, deadline)

    def _exporter(self) -> RowExporter:
        return self._loaded().exporter

    def _loaded(self) -> ServiceState:
        if self._state is None:
            raise EncoderUnavailable("the encoder is still loading its model: try again when it is SERVING")
        return self._state


class _Replies:
    """Writes the answers of one Encode call. Leases that its peer does not learn of are released at the end.

    A peer that cancels a call which has ended here names it in Release.

    Args:
        reserved: where rows that are sent as bytes are counted, until the call ends.
    """

    def __init__(self, context: EncodeContext, state: ServiceState, call: _Call, reserved: ReservedBytes) -> None:
        self._context = context
        self._exporter = state.exporter
        self._row_nbytes = state.row_nbytes
        self._session_id = call.session_id
        self._call_id = call.call_id
        self._reserved = reserved
        self._write_lock = asyncio.Lock()  # gRPC writes one message at a time
        self._leases: set[int] = set()
        self._delivered: set[int] = set()
        self._call: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        self._call = asyncio.current_task()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # A peer that has cancelled the request uses none of its leases, not even those whose Ready is in flight.
        cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        undelivered = self._leases if cancelled else self._leases - self._delivered
        if undelivered:
            self._exporter.release(self._session_id, sorted(undelivered))

    async def layout(self, item_index: int, layout: Layout) -> None:
        """
        Raises:
            Overloaded: the item's rows would be sent as bytes, and there is no memory for them.
        """
        nbytes = layout.num_tokens * self._row_nbytes
        # Before they are computed. Where a ticket is sent, rows may be claimed by it, and are counted then.
        is_large = nbytes > WINDOW_NBYTES and layout.ticket is None
        if is_large and self._exporter.sends_bytes(self._session_id, nbytes):
            self._reserved.reserve(nbytes)
        report_more(tokens=layout.num_tokens)
        await self._write(encoder_pb2.EncodeResponse(layout=layout_to_proto(item_index, layout)))

    @contextmanager
    def shipment(self, item_index: int) -> Iterator[_Shipment]:
        with self._exporter.async_pool_write(self._session_id) as early:
            yield _Shipment(self, item_index, early)

    async def failed(self, item_index: int, error: VitrineError) -> None:
        _log.info("item %d: %s: %s", item_index, error.code, error)
        report_more(failed_items=1)
        await self._write(failed_to_proto(item_index, error))

    async def ship(self, item_index: int, early: AsyncPoolWrite, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        report_slowest(vars(timings))
        rows = TensorSource(rows_TW)
        responses = self._exporter.export(self._session_id, item_index, rows, timings, early, self._call_id)
        async with aclosing(responses):
            async for response in responses:
                if isinstance(response, bytes):
                    await self._write(response)
                else:
                    await self._write_ready(response)

    async def _write_ready(self, response: encoder_pb2.EncodeResponse) -> None:
        lease_id = response.ready.lease.lease_id
        self._leases.add(lease_id)
        await self._write(response)
        self._delivered.add(lease_id)

    async def _write(self, message: Wire) -> None:
        async with self._write_lock:
            try:
                await send(self._context, message)
            except asyncio.CancelledError:
                # The peer has disconnected, so the other items cannot be sent either. The call's own task ends by this
                # error: cancelled in its last step it would be a fault of gRPC's, which logs a traceback.
                call = self._call
                if call is not None and call is not asyncio.current_task() and not is_own_cancellation():
                    call.cancel()
                raise


class _Shipment:
    """Ships one item's rows; see `service.Shipment`."""

    def __init__(self, replies: _Replies, item_index: int, hook: AsyncPoolWrite) -> None:
        self.hook = hook
        self._replies = replies
        self._item_index = item_index

    async def send(self, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        await self._replies.ship(self._item_index, self.hook, rows_TW, timings)


class EncoderServer(ServiceServer):
    """The encoder's listening port."""

    def __init__(
        self,
        servicer: EncoderServicer,
        rules: PeerRules | None = None,
        limits: PortLimits = DEFAULT_LIMITS,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        super().__init__(SERVICE, limits=limits, interceptors=interceptors)
        self.grpc.add_generic_rpc_handlers((encoder_handlers(servicer, rules),))
