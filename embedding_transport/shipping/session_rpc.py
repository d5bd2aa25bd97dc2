"""Connect and Release: the methods that all services which ship rows have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.grpc_status import abort, send
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.peers import peer_of

_MAX_RELEASED = 100_000

ConnectContext: TypeAlias = grpc.aio.ServicerContext[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]
ReleaseContext: TypeAlias = grpc.aio.ServicerContext[encoder_pb2.ReleaseRequest, encoder_pb2.ReleaseResponse]


class SessionServicer(ABC):
    """A base to list before a generated servicer, whose type declares generators where these are coroutines."""

    @abstractmethod
    def _exporter(self) -> RowExporter:
        """Returns the service's exporter.

        Raises:
            VitrineError: the service has none yet.
        """

    # Connect is a coroutine that writes, not a generator: when a peer disconnects, the cancellation is raised in it, so
    # that the leases are released at once and not when a generator is garbage-collected.

    async def Connect(self, requests: AsyncIterator[encoder_pb2.ConnectRequest], context: ConnectContext) -> None:
        try:
            async for response in self._exporter().connect(requests, peer_of(context)):
                await send(context, response)
        except Exception as error:
            await abort(context, error)

    async def Release(
        self, request: encoder_pb2.ReleaseRequest, context: ReleaseContext
    ) -> encoder_pb2.ReleaseResponse:
        try:
            check_release(request)
            exporter, session_id = self._exporter(), request.session_id
            num_released, num_unknown = exporter.release(session_id, request.lease_ids)
            if request.unread_calls:
                num_released += exporter.release_unread(session_id, read_lease_ids(request))
        except Exception as error:
            await abort(context, error)
        return encoder_pb2.ReleaseResponse(num_released=num_released, num_unknown=num_unknown)


def check_release(request: encoder_pb2.ReleaseRequest) -> None:
    """
    Raises:
        BadRequest: more leases, tickets and calls than a peer can have: to look for them would stop the event loop.
    """
    num_ids = len(request.lease_ids) + len(request.tickets) + len(request.unread_calls)
    if num_ids <= _MAX_RELEASED:
        num_ids += sum(len(call.read_lease_ids) for call in request.unread_calls)
    if num_ids > _MAX_RELEASED:
        raise BadRequest(f"{num_ids} leases, tickets and calls to release: at most {_MAX_RELEASED} are taken at once")


def read_lease_ids(request: encoder_pb2.ReleaseRequest) -> dict[int, frozenset[int]]:
    """The leases that were read, by the call; leases of call 0 are those of peers that name no calls."""
    return {call.call_id: frozenset(call.read_lease_ids) for call in request.unread_calls if call.call_id}


def session_handlers(servicer: Any) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Returns handlers of both methods, for a service to add to its own."""
    return {
        "Connect": grpc.stream_stream_rpc_method_handler(
            servicer.Connect,
            encoder_pb2.ConnectRequest.FromString,
            encoder_pb2.ConnectResponse.SerializeToString,
        ),
        "Release": grpc.unary_unary_rpc_method_handler(
            servicer.Release,
            encoder_pb2.ReleaseRequest.FromString,
            encoder_pb2.ReleaseResponse.SerializeToString,
        ),
    }
