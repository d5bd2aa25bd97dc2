"""The errors of both services, each with a stable code that clients receive.

VitrineError
├── BadRequest                invalid_request
│   ├── UnknownModel          model_not_found
│   ├── TooManyItems          too_many_items
│   ├── PromptTooLong         context_length_exceeded
│   └── PlaceholderMismatch   placeholder_mismatch
├── Unauthenticated           invalid_api_key
├── MediaError                invalid_media
│   ├── MediaNotAllowed       media_not_allowed
│   ├── MediaNotFound         media_not_found
│   ├── MediaUnreachable      media_unreachable
│   ├── MediaTimeout          media_timeout
│   ├── MediaTooLarge         media_too_large
│   ├── NotAnImage            not_an_image
│   ├── NotAVideo             not_a_video
│   ├── MediaTruncated        media_truncated
│   └── BadAspectRatio        bad_aspect_ratio
├── Overloaded                overloaded
│   └── RateLimited           rate_limit_exceeded
├── EncoderUnavailable        encoder_unavailable
│   └── EncoderMismatch       encoder_mismatch
├── WorkerUnavailable         worker_unavailable
├── PrefillUnavailable        prefill_unavailable
│   └── PrefillMismatch       prefill_mismatch
├── PeerNotAllowed            peer_not_allowed
├── TransportUnavailable      transport_unavailable
├── LeaseExpired              lease_expired
├── TicketExpired             ticket_expired
└── InternalError             internal_error
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable

_log = logging.getLogger(__name__)
# A service that loads, or whose peers are lost, may be back then; where there are others, one takes a retry at once.
_UNAVAILABLE_S = 5.0


class VitrineError(Exception):
    """The base of all errors for callers. The message states what was wrong, with the values, and what to do.

    param: the field of an OpenAI request that was wrong, if one was.
    retry_after_s: the time after which to retry, in seconds; 0 if unknown.
    """

    code = "internal_error"
    param: str | None = None
    retry_after_s: float = 0.0


class BadRequest(VitrineError):
    """A fault of the request. param: the name of the field at fault, None where it is no single one."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(BadRequest):
    code = "model_not_found"


class TooManyItems(BadRequest):
    code = "too_many_items"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"


class PlaceholderMismatch(BadRequest):
    code = "placeholder_mismatch"


class Unauthenticated(VitrineError):
    code = "invalid_api_key"


class MediaError(VitrineError):
    code = "invalid_media"


class MediaNotAllowed(MediaError):
    code = "media_not_allowed"


class MediaNotFound(MediaError):
    code = "media_not_found"


class MediaUnreachable(MediaError):
    code = "media_unreachable"


class MediaTimeout(MediaError):
    code = "media_timeout"


class MediaTooLarge(MediaError):
    code = "media_too_large"


class NotAnImage(MediaError):
    code = "not_an_image"


class NotAVideo(MediaError):
    code = "not_a_video"


class MediaTruncated(MediaError):
    code = "media_truncated"


class BadAspectRatio(MediaError):
    code = "bad_aspect_ratio"


class Overloaded(VitrineError):
    """The service has no capacity."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The caller's API key has used up a limit: the service may have capacity for others."""

    code = "rate_limit_exceeded"


class EncoderUnavailable(VitrineError):
    retry_after_s = _UNAVAILABLE_S
    code = "encoder_unavailable"


class EncoderMismatch(EncoderUnavailable):
    code = "encoder_mismatch"


class WorkerUnavailable(VitrineError):
    retry_after_s = _UNAVAILABLE_S
    code = "worker_unavailable"


class PrefillUnavailable(VitrineError):
    retry_after_s = _UNAVAILABLE_S
    code = "prefill_unavailable"


class PrefillMismatch(PrefillUnavailable):
    code = "prefill_mismatch"


class PeerNotAllowed(VitrineError):
    code = "peer_not_allowed"


class TransportUnavailable(VitrineError):
    code = "transport_unavailable"


class LeaseExpired(VitrineError):
    code = "lease_expired"


class TicketExpired(VitrineError):
    code = "ticket_expired"


class InternalError(VitrineError):
    code = "internal_error"


def soonest_overloaded(errors: Iterable[Exception]) -> Overloaded | None:
    """Returns the Overloaded error with the shortest retry time, or None if none of the errors is Overloaded."""
    overloaded = [error for error in errors if isinstance(error, Overloaded)]
    return min(overloaded, key=lambda error: error.retry_after_s, default=None)


def _subclasses(base: type[VitrineError]) -> list[type[VitrineError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in _subclasses(child))]


_MAX_RETRY_AFTER_S = 3600.0
_BY_CODE = {error.code: error for error in _subclasses(VitrineError)}


def error_from_code(code: str, message: str, retry_after_s: float = 0.0) -> VitrineError:
    """Returns the error with this code; an unknown code becomes InternalError and is kept in the message.

    Args:
        retry_after_s: of errors that say when to try again; what is no time of at most an hour counts as unknown.
    """
    error = _BY_CODE.get(code)
    if error is not None and issubclass(error, Overloaded):
        return error(message, retry_after_s if 0 <= retry_after_s <= _MAX_RETRY_AFTER_S else 0.0)
    return error(message) if error else InternalError(f"{code}: {message}")


def as_vitrine_error(error: Exception) -> VitrineError:
    """Returns the error itself, or for other exceptions an InternalError whose number is logged with the details."""
    if isinstance(error, VitrineError):
        return error
    number = uuid.uuid4().hex[:8]
    _log.error("internal error %s", number, exc_info=error)
    return InternalError(f"internal error {number}: the service's log has more")
