"""The calls in flight of each client of a gRPC port, by address: gRPC has no hook that knows whose a connection is."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import grpc

from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.api_keys import has_account
from vitrine_vlm.service_runtime.grpc_requests import MAX_WRAPPED_HANDLERS, behaviour_of, handler_of_kind
from vitrine_vlm.service_runtime.peers import host_of

# The calls in flight are the client's own, which learns of their ends before this port could say when they are.
_RETRY_S = 1.0


class ClientCalls(grpc.aio.ServerInterceptor):
    """Refuses calls of an address that has too many in flight, before their request is read.

    Calls with an API key are not counted: the key has limits of its own.

    Args:
        max_calls: in flight, of one address.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._num_of_host: Counter[str] = Counter()
        self._wrapped = lru_cache(MAX_WRAPPED_HANDLERS)(self._counted)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called in the task of the call, behind the check of its key."""
        handler = await continuation(handler_call_details)
        return handler and (handler if has_account() else self._wrapped(handler))

    def _counted(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour = behaviour_of(handler)

        async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            host = await self._admitted(context)
            with self._in_flight(host):
                return await behaviour(request, context)

        async def respond_by_generator(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            host = await self._admitted(context)
            with self._in_flight(host):
                async for response in behaviour(request, context):
                    yield response

        chosen = respond_by_generator if inspect.isasyncgenfunction(behaviour) else respond
        return handler_of_kind(handler, chosen, handler.request_deserializer)

    async def _admitted(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Returns the call's host; ends the call where that has too many."""
        host = host_of(context.peer())
        if self._num_of_host[host] >= self._max_calls:
            message = (
                f"{self._max_calls} calls of {host} are in flight, as many as one address may have: "
                "wait for answers, or raise --max-client-connections"
            )
            await abort(context, Overloaded(message, _RETRY_S))
        return host

    @contextmanager
    def _in_flight(self, host: str) -> Iterator[None]:
        self._num_of_host[host] += 1
        try:
            yield
        finally:
            self._num_of_host[host] -= 1
            if not self._num_of_host[host]:
                del self._num_of_host[host]
