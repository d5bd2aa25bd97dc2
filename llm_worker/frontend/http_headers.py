"""What all answers of the HTTP port have in common: the request's id, and which origins a browser may call it from."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from aiohttp import web

from vitrine_vlm.service_runtime.logs import set_request_id

_REQUEST_ID_HEADER = "X-Request-Id"
_VALID_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_PREFLIGHT_MAX_AGE_S = 600

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_request_id: ContextVar[str] = ContextVar("http_request_id")


def request_id() -> str:
    """The id of the request that the current task handles: the one in its x-request-id, or a new one."""
    return _request_id.get()


def id_headers() -> dict[str, str]:
    """Headers of a response that is sent before its handler returns; all others have them anyway."""
    return {_REQUEST_ID_HEADER: request_id()}


@web.middleware
async def with_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives every request an id, for the log and for the response's headers."""
    given = request.headers.get(_REQUEST_ID_HEADER, "")
    _request_id.set(given if _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
    set_request_id(request_id())
    response = await handler(request)
    if not response.prepared:
        response.headers.update(id_headers())
    return response


class AllowedOrigins:
    """Cross-origin resource sharing (CORS): lets pages of other origins call this port from a browser.

    Args:
        origins: such as https://example.com; "*" for any. With none, all is as if CORS did not exist.
    """

    def __init__(self, origins: frozenset[str]) -> None:
        self._origins = origins

    def add_to(self, application: web.Application) -> None:
        if self._origins:
            application.middlewares.append(self._answer_preflight)
            application.on_response_prepare.append(self._allow)

    @web.middleware
    async def _answer_preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers what a browser asks before it sends JSON to another origin."""
        asked = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or asked is None or not self._allowed(request):
            return await handler(request)
        headers = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": str(_PREFLIGHT_MAX_AGE_S),
        }
        return web.Response(status=204, headers=headers)

    async def _allow(self, http: web.Request, response: web.StreamResponse) -> None:
        response.headers.add("Vary", "Origin")  # whether or not it is allowed, so that no cache mixes them up
        if allowed := self._allowed(http):
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = f"{_REQUEST_ID_HEADER}, Retry-After"

    def _allowed(self, http: web.Request) -> str | None:
        """The origin that is allowed, or None."""
        origin = http.headers.get("Origin")
        if origin is None:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None
