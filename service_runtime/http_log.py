"""aiohttp's log of its servers, without what strangers sent."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError


def shorten_bad_requests() -> None:
    """Logs a request that is no HTTP as one line that has nothing of it.

    aiohttp logs a traceback with a piece of the request, in which a header or URL with a secret may stand.
    """
    logging.getLogger("aiohttp.server").addFilter(_shortened)


def _shortened(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.msg = f"{record.getMessage()}: {type(error).__name__}"
        record.args = ()
        record.exc_info = None
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
    return True
