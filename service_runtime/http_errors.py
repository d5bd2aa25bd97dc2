"""Errors over HTTP, in OpenAI's form, and the table from error code to status."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vitrine_vlm.errors import BadRequest, Unauthenticated, VitrineError, WorkerUnavailable, as_vitrine_error
from vitrine_vlm.service_runtime.access_log import report
from vitrine_vlm.service_runtime.http_requests import CLIENT_CLOSED_REQUEST

STATUS_BY_CODE: dict[str, int] = {
    "invalid_request": 400,
    "invalid_api_key": 401,
    "model_not_found": 404,
    "too_many_items": 400,
    "context_length_exceeded": 400,
    "placeholder_mismatch": 400,
    # Faults of media are faults of the request that names them.
    "invalid_media": 400,
    "media_not_allowed": 400,
    "media_not_found": 400,
    "media_unreachable": 400,
    "media_timeout": 400,
    "media_too_large": 400,
    "not_an_image": 400,
    "not_a_video": 400,
    "media_truncated": 400,
    "bad_aspect_ratio": 400,
    "overloaded": 429,
    "rate_limit_exceeded": 429,
    "encoder_unavailable": 503,
    "encoder_mismatch": 503,
    "worker_unavailable": 503,
    "prefill_unavailable": 503,
    "prefill_mismatch": 503,
    "peer_not_allowed": 503,
    "transport_unavailable": 503,
    "lease_expired": 503,
    "ticket_expired": 503,
    "internal_error": 500,
}
_LEAST_RETRY_S = 1
_BODY_HEADERS = ("content-type", "content-length")
_TYPE_BY_STATUS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def is_client_gone(request: web.Request, error: Exception) -> bool:
    """Whether aiohttp raised the error because the client has disconnected, which is no fault of the service."""
    closed = request.transport is None or request.transport.is_closing()
    return closed and isinstance(error, ConnectionError | web.RequestPayloadError)


def error_body(error: VitrineError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPE_BY_STATUS.get(STATUS_BY_CODE[error.code], "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: VitrineError) -> web.Response:
    status = STATUS_BY_CODE[error.code]
    report(outcome=error.code)
    # HTTP allows whole seconds only.
    retry_after_s = max(_LEAST_RETRY_S, math.ceil(error.retry_after_s))
    headers = {"Retry-After": str(retry_after_s)} if status in (429, 503) else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110, section 15.5.2
    response = web.json_response(error_body(error), status=status, headers=headers)
    if isinstance(error, WorkerUnavailable):
        # Behind a Kubernetes Service a client reaches another process by another connection only.
        response.force_close()
    return response


@web.middleware
async def errors_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answers every error of a handler, aiohttp's own included, in OpenAI's form."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        body = error_body(BadRequest(f"{request.method} {request.path}: {error.reason}"))
        # Some have headers that say what to do instead: Allow, for instance.
        headers = {name: value for name, value in error.headers.items() if name.lower() not in _BODY_HEADERS}
        return web.Response(
            status=error.status, text=json.dumps(body), content_type="application/json", headers=headers
        )
    except Exception as error:
        if is_client_gone(request, error):
            return web.Response(status=CLIENT_CLOSED_REQUEST)  # which the client does not receive
        return error_response(as_vitrine_error(error))
