"""What the HTTP ports of all services do with a request before they handle it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.traces import serving_span

MAX_BODY_BYTES = 256 * 1024 * 1024


@web.middleware
async def traced(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Opens the span of a POST request, which continues the trace of its headers."""
    if request.method != "POST":  # probes, metrics and pages
        return await handler(request)
    with serving_span(f"POST {request.path}", header_carrier(request)):
        return await handler(request)


def header_carrier(request: web.Request) -> dict[str, str]:
    """Returns the headers in the form that a caller's trace is read from, see `traces.serving_span`."""
    return {name.lower(): value for name, value in request.headers.items()}


async def json_body(http: web.Request) -> bytes:
    """Reads the body, which must be declared to be JSON.

    Raises:
        BadRequest: it is declared to be something else.
    """
    # Browsers let a page of another origin send this type only after a preflight request, which only allowed
    # origins get an answer to.
    if http.content_type != "application/json":
        raise BadRequest(f"the content type is {http.content_type}: send JSON as content-type: application/json")
    return await http.read()
