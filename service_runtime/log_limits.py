"""How much each place in the code may write to the log, and what is shown of a record.

Whatever a peer sends again and again ends at the same place in the code, so a budget of characters for each place
bounds the log, and the budget of one place takes nothing from the others.
"""

from __future__ import annotations

import copy
import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from vitrine_vlm.service_runtime.shown_urls import without_url_secrets

# A place in the code may write this much in each window, and at least one line.
BUDGET_CHARS = 16 * 1024
WINDOW_S = 10.0
MAX_MESSAGE_CHARS = 4 * 1024
MAX_TRACEBACK_CHARS = 12 * 1024
_EXAMPLE_CHARS = 100


def printable(text: str) -> str:
    r"""Returns text on one line: line breaks, control characters and the like as \n, \x1b, \u202e."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def message_of(record: logging.LogRecord) -> str:
    """Returns the message without secrets in URLs, of a long one the beginning."""
    message = record.getMessage()
    left_out = f"... ({len(message) - MAX_MESSAGE_CHARS} characters more)" if len(message) > MAX_MESSAGE_CHARS else ""
    return without_url_secrets(message[:MAX_MESSAGE_CHARS]) + left_out


def traceback_of(record: logging.LogRecord) -> str:
    """Returns the traceback without secrets in URLs, of a long one beginning and end; empty where there is none."""
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n... ({len(text) - 2 * half} characters)\n{text[-half:]}"
    return without_url_secrets(text)


@dataclass
class _Usage:
    """What one place has written since the window began, and how many lines it was not allowed to write."""

    began_at: float
    level: int
    example: str
    num_chars: int = 0
    num_suppressed: int = 0


class _Budgets:
    """What all places may still write. Not thread-safe: handlers have a lock.

    A count of what was left out is written in front of the first line, of any place, that comes after the window; at
    the end all are.
    """

    def __init__(self) -> None:
        self._usage: dict[tuple[str, str, int], _Usage] = {}

    def admits(self, record: logging.LogRecord, now: float) -> bool:
        """Whether the record's place has some of its budget left; counts the record if not."""
        place = _place(record)
        if (usage := self._usage.get(place)) is None:
            usage = self._usage[place] = _Usage(now, record.levelno, message_of(record)[:_EXAMPLE_CHARS])
        usage.num_suppressed += (is_over := usage.num_chars >= BUDGET_CHARS)
        return not is_over

    def count(self, record: logging.LogRecord, num_chars: int) -> None:
        """Counts what was written of a record that was admitted."""
        self._usage[_place(record)].num_chars += num_chars

    def reports(self, now: float) -> Iterator[logging.LogRecord]:
        """Begins new windows for all places whose window is over; yields a line for each that had lines suppressed."""
        for place, usage in list(self._usage.items()):
            if now - usage.began_at < WINDOW_S:
                continue
            del self._usage[place]
            if usage.num_suppressed:
                name, path, line = place
                counts = (usage.num_suppressed, usage.example, WINDOW_S)
                report = "%d more lines like %r in the last %g s"
                yield logging.LogRecord(name, usage.level, path, line, report, counts, None)


def _place(record: logging.LogRecord) -> tuple[str, str, int]:
    return record.name, record.pathname, record.lineno


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of each place in the code up to its budget, and then how many there were besides."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._budgets = _Budgets()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            now = time.monotonic()
            lines = [self.format(report) for report in self._budgets.reports(now)]
            if self._budgets.admits(record, now):
                lines.append(self.format(record))
                self._budgets.count(record, len(lines[-1]))
            if lines:
                self.stream.write("".join(line + self.terminator for line in lines))
                self.flush()
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        with self.lock:  # type: ignore[union-attr]  # None only for handlers that are never created
            for report in self._budgets.reports(float("inf")):
                super().emit(report)
        super().close()


class LimitedLines(logging.Handler):
    """Likewise, to the log of a program that this package is a part of.

    Args:
        target: the program's logger, whose level has been asked for already.
    """

    def __init__(self, target: logging.Logger) -> None:
        super().__init__()
        self._target = target
        self._budgets = _Budgets()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            now = time.monotonic()
            for report in self._budgets.reports(now):
                self._target.handle(report)
            if self._budgets.admits(record, now):
                shown = copy.copy(record)
                shown.msg, shown.args = printable(message_of(record)), ()
                shown.exc_text = traceback_of(record) or None
                self._budgets.count(record, len(shown.msg) + len(shown.exc_text or ""))
                self._target.handle(shown)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        with self.lock:  # type: ignore[union-attr]  # None only for handlers that are never created
            for report in self._budgets.reports(float("inf")):
                self._target.handle(report)
        super().close()
