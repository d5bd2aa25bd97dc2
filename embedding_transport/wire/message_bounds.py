"""Bounds on the messages of a gRPC port: on those that are read at once, that are kept, and that wait for a reader.

Of a message that is not asked for, HTTP/2's flow control lets 64 KiB through; the rest stays with its sender. So the
requests of each call are asked for here, a few at a time: gRPC says how long one is only once it is in memory. A stream
of requests, such as a session's, has as many as its method asks for. A request in pieces is a stream whose messages are
read as other methods' are, each with a slot of its own.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import grpc

from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.embedding_transport.wire.pieces_context import PiecesContext, max_piece_message_nbytes
from vitrine_vlm.embedding_transport.wire.reading_slots import ReadingSlots
from vitrine_vlm.embedding_transport.wire.unread_replies import BoundedContext, UnreadReplies
from vitrine_vlm.errors import BadRequest, Overloaded, VitrineError
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, ReservedBytes
from vitrine_vlm.service_runtime.grpc_requests import MAX_WRAPPED_HANDLERS, behaviour_of
from vitrine_vlm.service_runtime.port_limits import PortLimits
from vitrine_vlm.service_runtime.shared_timeout import SharedTimeout

# What flow control lets through anyway. So much is not counted: health checks and releases must pass.
WINDOW_NBYTES = 64 * 1024
# gRPC puts a message together on the event loop, and nothing else runs there meanwhile: with what is made of it, about
# as long as four copies take. Behind a large message its slot stays taken for as many copies as the message has MiB, at
# most for four, so that all large messages together take half of the loop. Longer pauses would make small requests on
# the same connection, those of a worker's other users, wait for a slot: how long a request is shows when it is read.
_LARGE_NBYTES = 1024 * 1024
_MAX_COPIES_OF_PAUSE = 4
# A stream's first message comes right behind its call: calls without one do not keep slots from others for long.
_FIRST_TIMEOUT_S = 5.0

_Parse = Callable[[bytes], Any]


@dataclass(frozen=True)
class _Kind:
    """Of messages.

    slots: with which they are read.
    max_nbytes: of one.
    counts_small: whether those count that flow control lets through.
    """

    slots: ReadingSlots
    max_nbytes: float = math.inf
    counts_small: bool = False


class MessageBounds(grpc.aio.ServerInterceptor):
    """Reads the requests of all methods, and ends replies that are not read.

    Args:
        budget: the process's; a request counts until its call ends.
        limits: of the port. Within its `client_timeout_s` a request must arrive, or a reply be taken.
    """

    def __init__(self, budget: ByteBudget, limits: PortLimits) -> None:
        self._budget = budget
        self._replies = UnreadReplies(budget, limits.client_timeout_s)
        self._timeout = self._replies.timeout
        self._first_timeout = SharedTimeout(min(limits.client_timeout_s, _FIRST_TIMEOUT_S))
        self._reading = ReadingSlots()
        self._whole = _Kind(self._reading)
        # Between two messages of a stream its client may do something, as map a pool: others are read meanwhile.
        self._reading_of_streams = ReadingSlots()
        self._of_streams = _Kind(self._reading_of_streams, max_nbytes=WINDOW_NBYTES)
        self._max_request_nbytes = limits.max_body_nbytes
        self._copy_s_per_byte = _copy_s_per_byte()
        self._parsing = asyncio.Lock()
        self._wrapped = lru_cache(MAX_WRAPPED_HANDLERS)(self._bounded)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        return handler and self._wrapped(handler)

    def _bounded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        serve = behaviour_of(handler)
        parse = cast(_Parse, handler.request_deserializer)
        if (max_nbytes := max_piece_message_nbytes(handler)) is not None:
            kind = _Kind(self._reading, max_nbytes, counts_small=True)
            return self._bounded_pieces(serve, parse, handler.response_serializer, kind)
        if handler.request_streaming:
            return self._bounded_stream(serve, parse, handler.response_serializer)

        # The iterator of requests keeps the last one until it is garbage-collected, so the context is read from.
        async def bounded(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            peer = context.peer()
            with self._budget.item() as reserved:
                replies = BoundedContext(context, peer, self._replies)
                # The request is the method's alone, which may discard it before it ends.
                return await serve(await self._request(context, peer, parse, reserved), replies)

        # To a client there is no difference: a stream of one request is what it sends anyway.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(cast(Any, bounded), None, handler.response_serializer)

    def _bounded_stream(self, serve: Any, parse: _Parse, serialize: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def bounded(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer = context.peer()
            try:
                with self._budget.item() as reserved:
                    replies = BoundedContext(context, peer, self._replies)
                    await serve(self._requests(context, peer, parse, reserved), replies)
            except VitrineError as error:
                await abort(context, error)

        async def bounded_generator(
            _: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            try:
                with self._budget.item() as reserved:
                    async for response in serve(self._requests(context, context.peer(), parse, reserved), context):
                        yield response
            except VitrineError as error:
                await abort(context, error)

        chosen = bounded_generator if inspect.isasyncgenfunction(serve) else bounded
        return grpc.stream_stream_rpc_method_handler(cast(Any, chosen), None, serialize)

    def _bounded_pieces(
        self, serve: Any, parse: _Parse, serialize: Any, kind: _Kind
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def bounded(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer = context.peer()
            with ExitStack() as stack:
                reserved = stack.enter_context(self._budget.item())

                async def discard_rest() -> None:
                    stack.close()  # what was read is not used
                    await self._discard(context, peer)

                replies = PiecesContext(context, peer, self._replies, self._timeout.seconds, discard_rest)
                await serve(self._pieces_of(replies, peer, parse, reserved, kind), replies)

        return grpc.stream_stream_rpc_method_handler(cast(Any, bounded), None, serialize)

    async def _request(
        self, context: grpc.aio.ServicerContext[Any, Any], peer: str, parse: _Parse, reserved: ReservedBytes
    ) -> Any:
        """Returns the call's only request; ends the call where it cannot be had."""
        try:
            request = await self._read(context, peer, parse, reserved, self._whole, self._timeout)
            if request is None:
                raise BadRequest("the call has no request: send one")
            return request
        except Exception as error:
            await abort(context, error)

    async def _requests(
        self, context: grpc.aio.ServicerContext[Any, Any], peer: str, parse: _Parse, reserved: ReservedBytes
    ) -> AsyncIterator[Any]:
        """The requests of a stream, all of them small.

        Raises:
            BadRequest, Overloaded: see `_read`.
        """
        kind, timeout = self._of_streams, self._first_timeout
        while (request := await self._read(context, peer, parse, reserved, kind, timeout)) is not None:
            timeout = self._timeout
            yield request

    async def _pieces_of(
        self, context: PiecesContext, peer: str, parse: _Parse, reserved: ReservedBytes, kind: _Kind
    ) -> AsyncIterator[Any]:
        """The messages of a request in pieces.

        Raises:
            BadRequest, Overloaded: see `_read`; BadRequest also where all come too slowly.
        """
        while (request := await self._read(context, peer, parse, reserved, kind, self._timeout)) is not None:
            if context.is_slow:
                raise BadRequest(f"{reserved.nbytes} bytes of the request came too slowly: send it faster, or URLs")
            yield request

    async def _read(
        self,
        context: grpc.aio.ServicerContext[Any, Any] | PiecesContext,
        peer: str,
        parse: _Parse,
        reserved: ReservedBytes,
        kind: _Kind,
        timeout: SharedTimeout,
    ) -> Any:
        """Returns the next request, or None at the end of the stream.

        Raises:
            BadRequest: the message does not arrive in time, or is longer than those of its kind.
            Overloaded: too many others are read, or in memory, or the connection does not read its replies.
        """
        self._replies.check(peer)
        await kind.slots.acquire(peer, self._timeout.seconds)
        pause_s = 0.0
        try:
            self._replies.check(peer)  # of those that began together all but the first have waited
            raw = await self._received(context, timeout)
            if raw is None:
                return None
            is_small = len(raw) <= WINDOW_NBYTES
            if is_small and not kind.counts_small:
                return parse(raw)
            pause_s = self._pause_s(len(raw)) * self._replies.slowdown(peer)
            if (nbytes := len(raw)) > kind.max_nbytes:
                del raw  # the error's traceback would keep it
                raise BadRequest(f"a message of {nbytes} bytes: a stream takes up to {kind.max_nbytes}")
            reserved.reserve(nbytes)
            if is_small:
                return parse(raw)
            # It is copied while the interpreter's lock is held: on a thread, and not several at once.
            async with self._parsing:
                return await asyncio.to_thread(parse, raw)
        finally:
            kind.slots.release_after(peer, pause_s)

    async def _discard(self, context: grpc.aio.ServicerContext[Any, Any], peer: str) -> None:
        """Reads a request to its end, within the port's limits of time and bytes, and keeps nothing of it."""
        slots, discarded_nbytes = self._reading, 0
        with suppress(Overloaded, TimeoutError):
            async with asyncio.timeout(self._timeout.seconds):
                while discarded_nbytes <= self._max_request_nbytes:
                    await slots.acquire(peer, self._timeout.seconds)
                    nbytes = 0
                    try:
                        raw = await context.read()
                        if not isinstance(raw, bytes):
                            return
                        nbytes = len(raw)
                        discarded_nbytes += nbytes
                        del raw
                    finally:
                        slots.release_after(peer, self._pause_s(nbytes) * self._replies.slowdown(peer))

    def _pause_s(self, nbytes: int) -> float:
        """For how long a slot that has read so many bytes stays taken, for each slot in use."""
        return min(nbytes // _LARGE_NBYTES, _MAX_COPIES_OF_PAUSE) * nbytes * self._copy_s_per_byte

    async def _received(
        self, context: grpc.aio.ServicerContext[Any, Any] | PiecesContext, timeout: SharedTimeout
    ) -> bytes | None:
        """
        Raises:
            BadRequest: see `_read`.
        """
        try:
            with timeout():
                raw = await context.read()
        except TimeoutError:
            if timeout is self._first_timeout:
                message = f"no message came within {timeout.seconds:g} s of the call: send the first one with it"
            else:
                message = (
                    f"the request did not arrive within {timeout.seconds:g} s (--client-timeout-s): send it faster, "
                    "or URLs instead of bytes"
                )
            raise BadRequest(message) from None
        return raw if isinstance(raw, bytes) else None  # the end of the stream


def _copy_s_per_byte() -> float:
    """CPU time of copying a byte of a large message into new memory, seconds."""
    message = bytes(8 * _LARGE_NBYTES)
    begin = time.thread_time()
    bytearray(message)
    return (time.thread_time() - begin) / len(message)
