"""Requests over gRPC that are no protobuf: refused with a code and one line in the log, for all methods of a port.

gRPC itself would log a traceback for each, and send the parser's words as UNKNOWN.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from vitrine_vlm.errors import BadRequest

# The trailing metadata in which the stable code of an error is sent.
ERROR_CODE_KEY = "vitrine-error-code"
# So many handlers are kept with what an interceptor made of them, as gRPC asks for one with each call: more
# than there are methods, and bounded, as a check of keys makes new ones.
MAX_WRAPPED_HANDLERS = 64

_log = logging.getLogger(__name__)


class MalformedRequest(BadRequest):
    """The bytes of a request are not its message."""


@dataclass(frozen=True)
class _Malformed:
    """Stands for a message that could not be parsed, until a method's wrapper can end the call."""

    nbytes: int


class RefusingMalformed(grpc.aio.ServerInterceptor):
    """Ends calls whose messages cannot be parsed with INVALID_ARGUMENT and `invalid_request`."""

    def __init__(self) -> None:
        self._wrapped = lru_cache(MAX_WRAPPED_HANDLERS)(_refusing_malformed)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        # None: there is no such method, and gRPC answers that.
        return handler and self._wrapped(handler, handler_call_details.method)


def _refusing_malformed(handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour = behaviour_of(handler)
    check = _checked_stream if handler.request_streaming else _checked_message

    async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            checked = [check(request, method, context)]
            del request  # the message is the method's alone, which may discard it before it ends
            return await behaviour(checked.pop(), context)
        except MalformedRequest as error:
            await _abort(context, error)

    async def respond_by_generator(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(check(request, method, context), context):
                yield response
        except MalformedRequest as error:
            await _abort(context, error)

    chosen = respond_by_generator if inspect.isasyncgenfunction(behaviour) else respond
    return handler_of_kind(handler, chosen, _tolerant(handler.request_deserializer))


def behaviour_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    """Returns what a handler of any kind calls: with a request, or an iterator of requests, and the context."""
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def handler_of_kind(
    handler: grpc.RpcMethodHandler[Any, Any], behaviour: Any, deserialize: Any
) -> grpc.RpcMethodHandler[Any, Any]:
    """Returns a handler of the same kind that calls something else, with what its method declares (attributes)."""
    made: dict[tuple[bool, bool], Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    of_kind: grpc.RpcMethodHandler[Any, Any] = made[handler.request_streaming, handler.response_streaming](
        wraps(behaviour_of(handler))(behaviour), deserialize, handler.response_serializer
    )
    return of_kind


def _tolerant(deserialize: Any) -> Callable[[bytes], Any]:
    """Returns a deserializer that does not raise, as gRPC would log that before any code of ours runs."""

    def parse(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return _Malformed(len(raw))

    return parse


def _checked_message(message: Any, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    """Returns the message.

    Raises:
        MalformedRequest: it could not be parsed; that is logged.
    """
    if not isinstance(message, _Malformed):
        return message
    error = MalformedRequest(f"{message.nbytes} bytes are not the protobuf message that {method} takes: see its .proto")
    _log.warning("%s: %s", context.peer(), error)
    raise error


async def _checked_stream(
    messages: AsyncIterator[Any], method: str, context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[Any]:
    async for message in messages:
        yield _checked_message(message, method, context)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: MalformedRequest) -> NoReturn:
    context.set_trailing_metadata(((ERROR_CODE_KEY, error.code),))
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
