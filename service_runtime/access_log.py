"""A line in the log for each request, whose values are attributes of the request's span, too.

Parts of a service report what they know of the request that they work for; without a line, they report it in vain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from opentelemetry.util.types import AttributeValue

from vitrine_vlm.service_runtime.logs import harmless
from vitrine_vlm.service_runtime.traces import annotate_span

_log = logging.getLogger(__name__)

# By name; a name in milliseconds ends with _ms.
Facts: TypeAlias = dict[str, AttributeValue]

# One dictionary a request, in which all of its tasks write.
_facts: ContextVar[Facts | None] = ContextVar("access_facts", default=None)


@contextmanager
def access_line(what: str, *, done: str | int = "OK", cancelled: str | int = "CANCELLED") -> Iterator[None]:
    """Logs a line about the current request at the end of the context, which is to be inside of the request's span.

    Args:
        what: method and path, or method.
        done, cancelled: the status where none is reported.
    """
    facts: Facts = {}
    token = _facts.set(facts)
    begin = time.monotonic()
    try:
        yield
        facts.setdefault("status", done)
    except asyncio.CancelledError:
        facts.setdefault("status", cancelled)
        raise
    finally:
        _facts.reset(token)
        with harmless("an access line"):
            _write(what, facts, (time.monotonic() - begin) * 1e3)


def report(**values: AttributeValue) -> None:
    """Reports values of the current request."""
    if (facts := _facts.get()) is not None:
        facts.update(values)


def report_more(**numbers: int) -> None:
    """Reports numbers of the current request that add up."""
    if (facts := _facts.get()) is not None:
        facts.update({name: _number(facts, name) + number for name, number in numbers.items()})


def report_slowest(stages_ms: Mapping[str, float]) -> None:
    """Reports times of stages, of which the current request may have several; the longest of each counts."""
    if (facts := _facts.get()) is not None:
        facts.update({name: max(_number(facts, name), round(ms, 1)) for name, ms in stages_ms.items() if ms > 0})


def report_peer(kind: str, address: str) -> None:
    """Reports a service that works for the current request, such as an encoder; there may be several."""
    if (facts := _facts.get()) is not None:
        known = facts.get(kind, ())
        assert isinstance(known, tuple)
        if address not in known:
            facts[kind] = (*known, address)


def _number(facts: Facts, name: str) -> float:
    value = facts.get(name, 0)
    assert isinstance(value, int | float)
    return value


def _write(what: str, facts: Facts, elapsed_ms: float) -> None:
    annotate_span({f"vitrine.{name}": value for name, value in facts.items()})
    status = facts.pop("status", "failed")
    texts = [f"{name}={_text(value)}" for name, value in facts.items()]
    fields = {"status": status, "elapsed_ms": round(elapsed_ms, 1), **facts}
    _log.info("%s: %s in %.1f ms %s", what, status, elapsed_ms, " ".join(texts), extra={"fields": fields})


def _text(value: AttributeValue) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
