"""Forwards Encode calls from outside item by item: each to the encoder that its content is routed to, and to another
one if that dies. Rows are forwarded as they arrive, as bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

import grpc
from ray.serve.handle import DeploymentHandle

from vitrine_vlm.deploy.ray_serve.encoder import EncoderReplica
from vitrine_vlm.embedding_transport.clients.encoder_client import ENCODE_RETRIES
from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.encoder_service.codec import failed_to_proto
from vitrine_vlm.errors import (
    BadRequest,
    EncoderUnavailable,
    InternalError,
    Overloaded,
    TooManyItems,
    TransportUnavailable,
    error_from_code,
    soonest_overloaded,
)
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.service_runtime.retry import Attempts
from vitrine_vlm.types import content_key

Metadata = Sequence[tuple[str, str]]

_DESCRIBE_TIMEOUT_S = 10.0


class EncodeForwarder:
    """Forwards requests to encoders.

    Args:
        encoders: replicas that ContentRouter chooses from.
        max_items: the most items accepted in one request.
        retry_s: seconds that an item waits for another encoder if one died.
    """

    def __init__(self, encoders: DeploymentHandle[EncoderReplica], max_items: int, retry_s: float) -> None:
        self._encoders = encoders
        self._max_items = max_items
        self._policy = replace(ENCODE_RETRIES, budget_s=retry_s)

    async def describe(self) -> encoder_pb2.DescribeResponse:
        """Returns the description of one encoder, without what does not work through the gateway.

        Raises:
            EncoderUnavailable: the encoder does not answer.
        """
        async with self._encoders.choose_replica(b"", []) as replica:
            address = replica.replica_metadata["address"]
            async with open_channel(address) as channel:
                stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
                try:
                    description = await stub.Describe(encoder_pb2.DescribeRequest(), timeout=_DESCRIBE_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    raise EncoderUnavailable(f"encoder {address}: {error.details()}; try again") from error
        description.transports[:] = ["grpc"]
        description.gpu_uuids[:] = []
        # Version 0 has no tickets.
        for field in ("protocol_minor_version", "instance_id", "ticket_ttl_s"):
            description.ClearField(field)
        return description

    def encode(
        self, request: encoder_pb2.EncodeRequest, metadata: Metadata = ()
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
        """Encodes the items; yields the encoders' responses.

        Args:
            metadata: sent to the encoders.

        Raises:
            BadRequest, TooManyItems, TransportUnavailable: the gateway cannot serve the request.
            VitrineError: an encoder refused it.
        """
        if request.session_id:
            raise TransportUnavailable("a session belongs to one encoder: call that one, or leave session_id empty")
        if request.layout_only or any(item.HasField("ticket") for item in request.items):
            raise TransportUnavailable("a ticket belongs to one encoder: ask for layouts there, and claim them there")
        if not request.items:
            raise BadRequest("the request has no media items: give at least one")
        if len(request.items) > self._max_items:
            raise TooManyItems(f"{len(request.items)} media items: at most {self._max_items} are accepted at once")
        events: EventStream[encoder_pb2.EncodeResponse] = EventStream(lambda response: None)
        # Ray Serve keeps only one of the choices that are made concurrently for one request.
        choosing = asyncio.Lock()

        async def begin() -> None:
            for index in range(len(request.items)):
                events.start(partial(self._encode_item, request, index, metadata, choosing, events))

        return events.read(begin)

    async def _encode_item(
        self,
        request: encoder_pb2.EncodeRequest,
        index: int,
        metadata: Metadata,
        choosing: asyncio.Lock,
        events: EventStream[encoder_pb2.EncodeResponse],
    ) -> None:
        """Emits all events of one item; the last one is a Failed if no encoder could encode it."""
        item = request.items[index]
        alone = encoder_pb2.EncodeRequest(request_id=request.request_id, tenant=request.tenant, items=[item])
        key = _routing_key(item)
        sent, attempts = _Sent(index), Attempts(self._policy)
        while True:
            async with AsyncExitStack() as stack:
                async with choosing:
                    choice = self._encoders.choose_replica(key, sorted(attempts.failures))
                    address = (await stack.enter_async_context(choice)).replica_metadata["address"]
                # Failed encoders come last. A lost one may be back; if an overloaded one is chosen, all are.
                if isinstance(attempts.failures.get(address), Overloaded):
                    break
                channel = await stack.enter_async_context(open_channel(address))
                try:
                    await self._forward(channel, address, alone, metadata, sent, events)
                    return
                except attempts.elsewhere as error:
                    attempts.failed(address, error)
            if not await attempts.pause():
                break
        last = soonest_overloaded(attempts.failures.values()) or attempts.failures[address]
        await events.emit(failed_to_proto(index, last))

    async def _forward(
        self,
        channel: grpc.aio.Channel,
        address: str,
        request: encoder_pb2.EncodeRequest,
        metadata: Metadata,
        sent: _Sent,
        events: EventStream[encoder_pb2.EncodeResponse],
    ) -> None:
        """Emits those of one encoder's responses that the caller does not have yet.

        Raises:
            EncoderUnavailable: the encoder was lost before the end.
            VitrineError: the encoder refused the request.
        """
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        call = stub.Encode(request, metadata=metadata)
        try:
            while isinstance(response := await call.read(), encoder_pb2.EncodeResponse):
                if response.HasField("failed"):
                    failed = response.failed
                    refusal = error_from_code(failed.code, failed.message, failed.retry_after_s)
                    if isinstance(refusal, self._policy.elsewhere):
                        raise refusal
                if sent.is_missing(response):
                    await events.emit(response)
        except grpc.aio.AioRpcError as error:
            lost = EncoderUnavailable(f"encoder {address} was lost: {error.details()}; try again")
            raise error_from_rpc(error) or lost from error
        finally:
            call.cancel()


def _routing_key(item: encoder_pb2.MediaItem) -> bytes:
    """Of the item's content and options."""
    if item.HasField("frames") or item.HasField("options"):
        return content_key(item.SerializeToString(deterministic=True), None)
    return content_key(item.patches.data or item.data or None, item.url)


def _timeless(layout: encoder_pb2.Layout) -> encoder_pb2.Layout:
    """Returns what is the same on each encoder."""
    copy = encoder_pb2.Layout()
    copy.CopyFrom(layout)
    copy.ClearField("queue_s")
    copy.ClearField("encode_s")
    return copy


class _Sent:
    """The part of an item that was sent to the caller: an encoder that replaces a lost one starts at the beginning."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._layout: encoder_pb2.Layout | None = None
        self._nbytes = 0

    def is_missing(self, response: encoder_pb2.EncodeResponse) -> bool:
        """Whether to forward the response; if so, it is reduced to the missing bytes and gets the item's index.

        Raises:
            InternalError: this encoder's layout of the item differs from that of the one before.
        """
        event = response.WhichOneof("event")
        if event == "layout":
            response.layout.item_index = self._index
            layout = _timeless(response.layout)
            earlier, self._layout = self._layout, layout
            if earlier not in (None, layout):
                raise InternalError(f"item {self._index} has layout {layout} now and had {earlier} before")
            return earlier is None
        if event == "chunk":
            chunk = response.chunk
            chunk.item_index = self._index
            if num_known := self._nbytes - chunk.offset:
                chunk.offset, chunk.data = self._nbytes, chunk.data[num_known:]
            self._nbytes += len(chunk.data)
            return bool(chunk.data)
        response.failed.item_index = self._index
        return True
