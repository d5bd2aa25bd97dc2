"""What the HTTP ports of all services do with a request before they handle it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.access_log import access_line, report
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, ReservedBytes
from vitrine_vlm.service_runtime.memory_file import MemoryFile
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS, LEAST_BYTES_PER_S, PortLimits
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.traces import serving_span

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A body counts as so many times its length until its request ends: what was sent, its strings, and the messages that
# are made of it (measured, docs/reliability.md).
BODY_COPIES = 3
CLIENT_CLOSED_REQUEST = 499  # nginx's
_SHOWN_PATH_CHARS = 200
# A body from this size on takes longer to copy than other requests should wait.
_LARGE_NBYTES = 4 * 1024 * 1024
# A larger body of JSON is read by a process of its own: no usual picture waits for that.
LARGE_BODY_NBYTES = 8 * 1024 * 1024


@dataclass
class _Body:
    """The bounds on one request's body. reads, turn: of its port. nbytes: how much of it was read."""

    limits: PortLimits
    reads: RunningCalls
    reserved: ReservedBytes | None = None
    nbytes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


_BODY = web.RequestKey("body", _Body)


@web.middleware
async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Opens the span of a POST request, which continues the trace of its headers; logs that and others to the API."""
    if request.method == "POST" and request.path != "/ping":
        with serving_span(f"POST {request.path}", header_carrier(request)):
            return await _logged(request, handler)
    if request.path.startswith("/v1/"):
        return await _logged(request, handler)
    return await handler(request)  # probes, metrics and pages


async def _logged(request: web.Request, handler: Handler) -> web.StreamResponse:
    with access_line(f"{request.method} {request.path[:_SHOWN_PATH_CHARS]}", cancelled=CLIENT_CLOSED_REQUEST):
        response = await handler(request)
        report(status=response.status)
        return response


def header_carrier(request: web.Request) -> dict[str, str]:
    """Returns the headers in the form that a caller's trace is read from, see `traces.serving_span`."""
    return {name.lower(): value for name, value in request.headers.items()}


def bodies_within(limits: PortLimits, budget: ByteBudget, reads: RunningCalls) -> Any:
    """Returns a middleware that refuses bodies which are compressed, too large, or more than there is memory for.

    `reads` are the reads of bodies in flight, which can be ended through it.
    What `read_body` reads counts in the budget until the request ends. The middleware raises HTTPUnsupportedMediaType,
    HTTPRequestEntityTooLarge and Overloaded.
    """
    turn = asyncio.Lock()

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":  # a small body could become a large one
            raise web.HTTPUnsupportedMediaType(reason="the body is compressed: send it as it is")
        nbytes = request.content_length or 0
        if nbytes > limits.max_body_nbytes:
            raise web.HTTPRequestEntityTooLarge(limits.max_body_nbytes, nbytes)
        with budget.item() as reserved:
            if nbytes:
                reserved.check(BODY_COPIES * nbytes)
            request[_BODY] = _Body(limits, reads, reserved, turn=turn)
            return await handler(request)

    return bounded


async def body_pieces(http: web.Request) -> AsyncIterator[bytes]:
    """The pieces of a body as they arrive.

    Raises:
        HTTPRequestTimeout: the client has stopped to send, or sends too slowly.
        VitrineError: the service is ending, see `HttpPort.answered`.
    """
    loop, timeout_s, reads = asyncio.get_running_loop(), _body(http).limits.client_timeout_s, _body(http).reads
    begin, nbytes = loop.time(), 0
    while not http.content.at_eof():
        slowest = begin + timeout_s + nbytes / LEAST_BYTES_PER_S
        try:
            async with asyncio.timeout_at(min(loop.time() + timeout_s, slowest)):
                with reads.track():
                    piece = await http.content.readany()
        except TimeoutError:
            reason = f"the body stopped after {nbytes} bytes for {timeout_s:g} s, or came too slowly"
            raise web.HTTPRequestTimeout(reason=reason) from None
        if not piece:
            return
        nbytes += len(piece)
        yield piece


def reading(http: web.Request) -> AbstractContextManager[None]:
    """Counts, in its context, the request as one whose body is still read: an ending service does not wait for it.

    Raises:
        VitrineError: the service is ending, see `HttpPort.answered`.
    """
    return _body(http).reads.track()


async def read_body(http: web.Request) -> bytes:
    """Reads the body, once.

    Raises:
        HTTPRequestEntityTooLarge: more bytes than one body may have.
        HTTPRequestTimeout, VitrineError: see `body_pieces`.
        Overloaded: the bodies of other requests take too much memory.
    """
    return await _joined([piece async for piece in _counted_pieces(http)])


async def _joined(pieces: list[bytes]) -> bytes:
    if len(pieces) == 1:
        return pieces[0]
    if sum(map(len, pieces)) < _LARGE_NBYTES:
        return b"".join(pieces)
    return await asyncio.to_thread(b"".join, pieces)  # without the interpreter's lock


async def _counted_pieces(http: web.Request) -> AsyncIterator[bytes]:
    """See `read_body`."""
    body = _body(http)
    async for piece in body_pieces(http):
        body.nbytes += len(piece)
        if body.nbytes > body.limits.max_body_nbytes:
            raise web.HTTPRequestEntityTooLarge(body.limits.max_body_nbytes, body.nbytes)
        if body.reserved is not None:
            body.reserved.reserve(BODY_COPIES * len(piece))
        if body.nbytes > LARGE_BODY_NBYTES:
            async with body.turn:  # an iteration of the event loop has one piece of all large bodies at most
                await asyncio.sleep(0)
        yield piece


async def json_body(http: web.Request) -> bytes | MemoryFile:
    """Reads the body, which must be declared to be JSON, see `read_body`; a large one into a file, for a `BodyReader`.

    The caller closes the file, not on the event loop.

    Raises:
        BadRequest: it is declared to be something else.
    """
    # Browsers let a page of another origin send this type only after a preflight request, which only allowed
    # origins get an answer to.
    if http.content_type != "application/json":
        raise BadRequest(f"the content type is {http.content_type}: send JSON as content-type: application/json")
    pieces: list[bytes] = []
    file: MemoryFile | None = None
    try:
        async for piece in _counted_pieces(http):
            pieces.append(piece)
            if _body(http).nbytes > LARGE_BODY_NBYTES:
                file = file or MemoryFile()
                for each in pieces:
                    file.append(each)
                pieces.clear()
    except BaseException:
        if file is not None:
            asyncio.get_running_loop().run_in_executor(None, file.close)
        raise
    return file or await _joined(pieces)


def _body(http: web.Request) -> _Body:
    """The request's bounds: the usual limits, without a budget, where no port has set others."""
    body = http.get(_BODY)
    if body is None:
        body = http[_BODY] = _Body(DEFAULT_LIMITS, RunningCalls())
    return body
