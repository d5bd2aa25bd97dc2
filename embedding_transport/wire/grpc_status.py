"""Errors over gRPC: one table from error code to status, and the inverse.

The stable code is sent in the trailing metadata, because the status alone does not determine it. The time after which
to retry is sent there, too, under the key that gRPC's own clients read for their retries (gRFC A6).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc

from vitrine_vlm.errors import InternalError, Overloaded, VitrineError, as_vitrine_error, error_from_code
from vitrine_vlm.service_runtime.access_log import access_line, report
from vitrine_vlm.service_runtime.grpc_requests import ERROR_CODE_KEY as ERROR_CODE_KEY

ResponseT = TypeVar("ResponseT")

RETRY_KEY = "grpc-retry-pushback-ms"
_LEAST_RETRY_S = 1.0
# The message is sent in the trailers, percent-encoded (up to three bytes for one); trailers of 8 KiB are refused.
_MAX_MESSAGE_NBYTES = 2048

_Status = grpc.StatusCode
STATUS_BY_CODE: dict[str, grpc.StatusCode] = {
    "invalid_request": _Status.INVALID_ARGUMENT,
    "invalid_api_key": _Status.UNAUTHENTICATED,
    "model_not_found": _Status.NOT_FOUND,
    "too_many_items": _Status.INVALID_ARGUMENT,
    "context_length_exceeded": _Status.INVALID_ARGUMENT,
    "placeholder_mismatch": _Status.INVALID_ARGUMENT,
    "invalid_media": _Status.INVALID_ARGUMENT,
    "media_not_allowed": _Status.PERMISSION_DENIED,
    "media_not_found": _Status.NOT_FOUND,
    "media_unreachable": _Status.FAILED_PRECONDITION,
    "media_timeout": _Status.DEADLINE_EXCEEDED,
    "media_too_large": _Status.INVALID_ARGUMENT,
    "not_an_image": _Status.INVALID_ARGUMENT,
    "not_a_video": _Status.INVALID_ARGUMENT,
    "media_truncated": _Status.INVALID_ARGUMENT,
    "bad_aspect_ratio": _Status.INVALID_ARGUMENT,
    "overloaded": _Status.RESOURCE_EXHAUSTED,
    "rate_limit_exceeded": _Status.RESOURCE_EXHAUSTED,
    "encoder_unavailable": _Status.UNAVAILABLE,
    "encoder_mismatch": _Status.FAILED_PRECONDITION,
    "worker_unavailable": _Status.UNAVAILABLE,
    "prefill_unavailable": _Status.UNAVAILABLE,
    "prefill_mismatch": _Status.FAILED_PRECONDITION,
    "peer_not_allowed": _Status.PERMISSION_DENIED,
    "transport_unavailable": _Status.FAILED_PRECONDITION,
    "lease_expired": _Status.ABORTED,
    "ticket_expired": _Status.ABORTED,
    "internal_error": _Status.INTERNAL,
}


@contextmanager
def logged_call(method: str) -> Iterator[None]:
    """Logs a line about the current call at the end of the context; errors are those that `abort` sends."""
    with access_line(method):
        try:
            yield
        except Exception as error:
            if is_peer_gone(error):
                report(status=grpc.StatusCode.CANCELLED.name)
            else:
                code = error.code if isinstance(error, VitrineError) else InternalError.code
                report(status=STATUS_BY_CODE[code].name, outcome=code)
            raise


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the error's status, message and code; other exceptions become a number that the log explains.

    Long messages are truncated: with trailers above gRPC's limit the peer would get neither message nor code.

    Raises:
        CancelledError: the peer has disconnected.
    """
    if is_peer_gone(error):
        raise asyncio.CancelledError("the peer is gone") from error
    error = as_vitrine_error(error)
    if context.done():
        raise asyncio.CancelledError("the peer is gone") from error
    metadata = [(ERROR_CODE_KEY, error.code)]
    if isinstance(error, Overloaded) or error.retry_after_s:
        metadata.append((RETRY_KEY, str(math.ceil(max(error.retry_after_s, _LEAST_RETRY_S) * 1000))))
    context.set_trailing_metadata(tuple(metadata))
    await context.abort(STATUS_BY_CODE[error.code], _sendable(str(error)))


async def send(context: grpc.aio.ServicerContext[Any, ResponseT], message: ResponseT) -> None:
    """Writes one message of a stream.

    Raises:
        CancelledError: the peer has disconnected; if gRPC notices that first, it cancels the call itself.
    """
    try:
        await context.write(message)
    except Exception as error:
        if not is_peer_gone(error):
            raise
        raise asyncio.CancelledError("the peer is gone") from error


def is_peer_gone(error: Exception) -> bool:
    """Whether gRPC raised this error because the call is over: by its peer, which may be lost, or with the server."""
    # The error of a server that has stopped has no public name. AbortError is how a call is ended here.
    return isinstance(error, grpc.aio.BaseError) and not isinstance(error, grpc.aio.AbortError)


def _sendable(message: str) -> str:
    """Returns the message as valid UTF-8 (JSON may contain lone surrogates) of at most _MAX_MESSAGE_NBYTES."""
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MAX_MESSAGE_NBYTES:
        return encoded.decode()
    return encoded[: _MAX_MESSAGE_NBYTES - 3].decode(errors="ignore") + "..."


def error_from_rpc(error: grpc.aio.AioRpcError) -> VitrineError | None:
    """Returns the error that the peer raised, or None if the call itself failed (no connection, cancelled, ...)."""
    metadata = {key: str(value) for key, value in error.trailing_metadata() or ()}
    if ERROR_CODE_KEY not in metadata:
        return None
    retry_ms = metadata.get(RETRY_KEY, "")
    retry_after_s = int(retry_ms) / 1000 if retry_ms.isdecimal() and len(retry_ms) < 10 else 0.0
    return error_from_code(metadata[ERROR_CODE_KEY], error.details() or "", retry_after_s)
