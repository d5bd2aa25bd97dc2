"""Encode calls from outside, forwarded item by item: each to the encoder where its content belongs, and to another one
if that dies. Rows are sent on as they arrive, as bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

import grpc
from ray.serve.handle import DeploymentHandle

from deploy.ray_serve.encoder import EncoderReplica
from deploy.ray_serve.patience import Patience
from embedding_transport.content_routing import content_key
from embedding_transport.errors import (
    BadRequest,
    EncoderUnavailable,
    InternalError,
    Overloaded,
    TooManyItems,
    TransportUnavailable,
)
from embedding_transport.grpc_status import error_from_rpc
from embedding_transport.merge import merged
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from service_runtime.grpc_channel import open_channel

Metadata = Sequence[tuple[str, str]]

_DESCRIBE_TIMEOUT_S = 10.0
# Nothing is wrong with the item: another encoder may take it.
_ELSEWHERE = (EncoderUnavailable.code, Overloaded.code)
# What a call ends with where the encoder was killed, or stopped waiting for it.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class EncodeForwarder:
    """
    Args:
        encoders: they are chosen by ContentRouter.
        max_items: accepted in one request.
        retry_s: how long an item waits for an encoder in place of one that died.
    """

    def __init__(self, encoders: DeploymentHandle[EncoderReplica], max_items: int, retry_s: float) -> None:
        self._encoders = encoders
        self._max_items = max_items
        self._retry_s = retry_s

    async def describe(self) -> encoder_pb2.DescribeResponse:
        """What one of the encoders serves, less the transports that cannot be had here.

        Raises:
            EncoderUnavailable: it does not answer.
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
        return description

    async def encode(
        self, request: encoder_pb2.EncodeRequest, metadata: Metadata = ()
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
        """
        Args:
            metadata: for the encoders.

        Raises:
            BadRequest, TooManyItems, TransportUnavailable: the request cannot be served here.
            VitrineError: an encoder refused it.
        """
        if request.session_id:
            raise TransportUnavailable("a session is with one encoder: call that one, or leave session_id empty")
        if not request.items:
            raise BadRequest("the request has no media items: give at least one")
        if len(request.items) > self._max_items:
            raise TooManyItems(f"{len(request.items)} media items: at most {self._max_items} are accepted at once")
        # Of the choices that are made at the same time for one request Ray Serve forgets all but one.
        choosing = asyncio.Lock()
        items = [self._encode_item(request, index, metadata, choosing) for index in range(len(request.items))]
        async with aclosing(merged(items, lambda response: None)) as responses:
            async for response in responses:
                yield response

    async def _encode_item(
        self, request: encoder_pb2.EncodeRequest, index: int, metadata: Metadata, choosing: asyncio.Lock
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
        """Everything about one item. It ends with a Failed where no encoder could take it."""
        item = request.items[index]
        alone = encoder_pb2.EncodeRequest(request_id=request.request_id, tenant=request.tenant, items=[item])
        key = content_key(item.data or None, item.url)
        sent, patience = _Sent(index), Patience(self._retry_s)
        failures: dict[str, encoder_pb2.Failed] = {}
        while True:
            async with AsyncExitStack() as stack:
                async with choosing:
                    choice = self._encoders.choose_replica(key, sorted(failures))
                    address = (await stack.enter_async_context(choice)).replica_metadata["address"]
                failure = failures.get(address)
                # Those that failed come last. A lost one may be back by now; if it is overloaded, all of them are.
                if failure is not None and failure.code == Overloaded.code:
                    break
                failure = None
                async with aclosing(_encode_on(address, alone, metadata)) as responses:
                    async for response in responses:
                        if response.failed.code in _ELSEWHERE:
                            failure = failures[address] = response.failed
                        elif sent.is_missing(response):
                            yield response
                if failure is None:
                    return
            if not await patience.pause():
                break
        failure.item_index = index
        yield encoder_pb2.EncodeResponse(failed=failure)


class _Sent:
    """What the caller has got of an item: an encoder that takes over from a lost one starts from the beginning."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._layout: encoder_pb2.Layout | None = None
        self._nbytes = 0

    def is_missing(self, response: encoder_pb2.EncodeResponse) -> bool:
        """Whether to send it on; if so, it is cut to what the caller lacks and has the item's index in the request.

        Raises:
            InternalError: this encoder makes something else of the item than the one before.
        """
        event = response.WhichOneof("event")
        if event == "layout":
            response.layout.item_index = self._index
            earlier, self._layout = self._layout, response.layout
            if earlier not in (None, response.layout):
                raise InternalError(f"item {self._index} has layout {response.layout} now and had {earlier} before")
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


async def _encode_on(
    address: str, request: encoder_pb2.EncodeRequest, metadata: Metadata
) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
    """The encoder's responses; a Failed of our own comes last if it is lost before it is done."""
    async with open_channel(address) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        call = stub.Encode(request, metadata=metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            named = error_from_rpc(error)
            if named is not None and not isinstance(named, EncoderUnavailable):
                raise named from error
            if named is None and error.code() not in _LOST:
                raise InternalError(f"encoder {address}: {error.code().name} {error.details()}") from error
            message = f"encoder {address} was lost: {error.details()}; try again"
            failed = encoder_pb2.Failed(code=EncoderUnavailable.code, message=message)
            yield encoder_pb2.EncodeResponse(failed=failed)
        finally:
            call.cancel()
