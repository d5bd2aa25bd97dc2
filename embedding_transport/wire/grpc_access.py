"""The check of a gRPC port: which calls need an API key, and as which tenant they run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.traces import metadata_carrier

# Probes, as over HTTP. Reflection needs a key like all else: what it shows is no secret, but it is work for a stranger.
OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})


class GrpcAccess(grpc.aio.ServerInterceptor):
    """Refuses calls that are not admitted before their message is read."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called in the task of the call, which ends with it."""
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        if service not in OPEN_SERVICES:
            try:
                end = self._access.begin(metadata_carrier(handler_call_details.invocation_metadata))
            except VitrineError as error:
                return _refusing(error)
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda task: end())
        return await continuation(handler_call_details)


def _refusing(error: VitrineError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler for calls of every kind: one that takes a stream is called without waiting for a message."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
