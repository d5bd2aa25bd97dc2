"""The log of a service: text for people or JSON for collectors, each line with the id of its request."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from vitrine_vlm.service_runtime.log_limits import LimitedHandler, message_of, printable, traceback_of

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_log = logging.getLogger(__name__)
_MAX_ID_LENGTH = 64
_request_id: ContextVar[str] = ContextVar("request_id", default="")
_key_name: ContextVar[str] = ContextVar("key_name", default="")


def set_request_id(request_id: str) -> None:
    """Sets the request id for the log lines of the current task and of the tasks that it starts from now on."""
    _request_id.set(request_id[:_MAX_ID_LENGTH])


def set_key_name(name: str) -> None:
    """Sets the name of the request's API key, likewise; "" for none."""
    _key_name.set(name)


def start_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Sends the log of the whole process to stderr, libraries' lines included, within `log_limits`."""
    handler = LimitedHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.addHandler(handler)


def log_at_any_level(logger: logging.Logger, message: str, *arguments: object) -> None:
    """Logs a line of level info whatever the log's level is, because another process waits for the line."""
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, arguments, None))


def harmless(what: str) -> AbstractContextManager[None]:
    """Logs and suppresses exceptions of its body: for metrics and the like, which must not fail a request."""
    return _Harmless(what)


class _Harmless:
    # No generator as a context manager: each item passes eight of these, and a generator costs three times as much.

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        _log.error("%s failed", self._what, exc_info=error)
        return True


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = _request_id.get()
        request = f"[{request_id!r}] " if request_id else ""
        key = f"[key {name}] " if (name := _key_name.get()) else ""
        start = f"{self.formatTime(record)} {record.levelname} {record.name} {request}{key}"
        line = start + printable(message_of(record))
        # Clients choose parts of messages and of exceptions: nothing in them must look like a line of this log.
        return "\n    ".join([line, *map(printable, traceback_of(record).splitlines())])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message_of(record),
        }
        if fields := getattr(record, "fields", None):
            line |= fields
        if request_id := _request_id.get():
            line["request_id"] = request_id
        if name := _key_name.get():
            line["key_name"] = name
        if exception := traceback_of(record):
            line["exception"] = exception
        return json.dumps(line)  # ASCII alone, everything else escaped
