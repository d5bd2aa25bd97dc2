"""Bounds on the messages of a gRPC port: on those that are read at once, that are kept, and that wait for a reader.

Of a message that is not asked for, HTTP/2's flow control lets 64 KiB through; the rest stays with its sender. So the
request of each call is asked for here, a few at a time: gRPC says how long one is only once it is in memory.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast

import grpc
from google.protobuf.message import Message

from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import BadRequest, Overloaded
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, ReservedBytes
from vitrine_vlm.service_runtime.grpc_requests import MAX_WRAPPED_HANDLERS
from vitrine_vlm.service_runtime.peers import host_of
from vitrine_vlm.service_runtime.shared_timeout import SharedTimeout

_log = logging.getLogger(__name__)
# Requests that are read at once, those of them from one address, and those on one connection, so that what is sent
# slowly does not keep out other clients, also where they are on one host.
MAX_READING = 6
_MAX_READING_OF_HOST, _MAX_READING_OF_CONNECTION = 4, 2
# What flow control lets through anyway. So much is not counted: health checks and releases must pass.
WINDOW_NBYTES = 64 * 1024

_Parse = Callable[[bytes], Any]


class MessageBounds(grpc.aio.ServerInterceptor):
    """Reads the requests of all methods that have a single one, and ends replies that are not read.

    Messages of a stream of requests are not bounded here.

    Args:
        budget: the process's; a request counts until its call ends.
        timeout_s: longest time in which a request must arrive, or a reply be taken, seconds.
    """

    def __init__(self, budget: ByteBudget, timeout_s: float) -> None:
        self._budget = budget
        self._timeout = SharedTimeout(timeout_s)
        self._reading = _ReadingSlots()
        self._parsing = asyncio.Lock()
        self._wrapped = lru_cache(MAX_WRAPPED_HANDLERS)(self._bounded)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        return self._wrapped(handler)

    def _bounded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        serve: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        parse = cast(_Parse, handler.request_deserializer)

        # The iterator of requests keeps the last one until it is garbage-collected, so the context is read from.
        async def bounded(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._budget.item() as reserved:
                replies = BoundedContext(context, self._budget, self._timeout)
                # The request is the method's alone, which may discard it before it ends.
                return await serve(await self._request(context, parse, reserved), replies)

        # To a client there is no difference: a stream of one request is what it sends anyway.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(cast(Any, bounded), None, handler.response_serializer)

    async def _request(
        self, context: grpc.aio.ServicerContext[Any, Any], parse: _Parse, reserved: ReservedBytes
    ) -> Any:
        """Returns the call's request; ends the call where it cannot be had."""
        try:
            return await self._read(context, parse, reserved)
        except Exception as error:
            await abort(context, error)

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any], parse: _Parse, reserved: ReservedBytes) -> Any:
        """
        Raises:
            BadRequest: the message does not arrive in time, or there is none.
            Overloaded: too many others are read, or in memory.
        """
        peer = context.peer()
        await self._reading.acquire(peer, self._timeout.seconds)
        try:
            raw = await self._received(context)
            if len(raw) <= WINDOW_NBYTES:
                return parse(raw)
            reserved.reserve(len(raw))
            # It is copied while the interpreter's lock is held: on a thread, and not several at once.
            async with self._parsing:
                return await asyncio.to_thread(parse, raw)
        finally:
            self._reading.release(peer)

    async def _received(self, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """
        Raises:
            BadRequest: see `_read`.
        """
        try:
            with self._timeout():
                raw = await context.read()
        except TimeoutError:
            raise BadRequest(
                f"the request did not arrive within {self._timeout.seconds:g} s (--client-timeout-s): send it faster, "
                "or URLs instead of bytes"
            ) from None
        if not isinstance(raw, bytes):  # the end of the stream
            raise BadRequest("the call has no request: send one")
        return raw


class _ReadingSlots:
    """Which calls read their request now. The newest comes first: a small request does not wait for many large ones.

    Peers are addresses as gRPC writes them, with the port: one each connection.
    """

    def __init__(self) -> None:
        self._num_of_peer: Counter[str] = Counter()
        self._num_of_host: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def acquire(self, peer: str, timeout_s: float) -> None:
        """Waits for a slot, which the caller releases.

        Raises:
            Overloaded: none is free in time.
        """
        if self._has_room(peer):
            self._count(peer)
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting.append((peer, granted))
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.release(peer)
            else:
                self._waiting.remove((peer, granted))
            if not isinstance(error, TimeoutError):
                raise
            raise Overloaded(
                f"too many requests are read, those of {host_of(peer)} among them: retry later",
                retry_after_s=timeout_s,
            ) from None

    def release(self, peer: str) -> None:
        for counter, name in ((self._num_of_peer, peer), (self._num_of_host, host_of(peer))):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        for index in reversed(range(len(self._waiting))):
            waiting_peer, granted = self._waiting[index]
            if not granted.done() and self._has_room(waiting_peer):
                del self._waiting[index]
                self._count(waiting_peer)
                granted.set_result(None)
                return

    def _count(self, peer: str) -> None:
        self._num_of_peer[peer] += 1
        self._num_of_host[host_of(peer)] += 1

    def _has_room(self, peer: str) -> bool:
        return (
            self._num_of_host.total() < MAX_READING
            and self._num_of_host[host_of(peer)] < _MAX_READING_OF_HOST
            and self._num_of_peer[peer] < _MAX_READING_OF_CONNECTION
        )


class BoundedContext:
    """A call's context whose writes end, with the call, when the peer does not read."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], budget: ByteBudget, timeout: SharedTimeout) -> None:
        self._context = context
        self._budget = budget
        self._timeout = timeout
        self._call = asyncio.current_task()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Message | bytes) -> None:
        """
        Raises:
            CancelledError: the peer has not read for too long, as if it had disconnected.
        """
        try:
            with self._timeout():
                await self._context.write(message)
        except TimeoutError:
            nbytes = len(message) if isinstance(message, bytes) else message.ByteSize()
            self._count_stuck(nbytes)
            _log.info("a call ends: %s has not read %d bytes within %g s", self.peer(), nbytes, self._timeout.seconds)
            raise asyncio.CancelledError("the peer does not read") from None

    def _count_stuck(self, nbytes: int) -> None:
        """Counts a message that gRPC keeps until the peer reads or disconnects: as long as it keeps the call's task."""
        stuck = self._budget.item()
        with suppress(Overloaded):
            stuck.reserve(nbytes)
        if self._call is not None:
            weakref.finalize(self._call, stuck.release)
