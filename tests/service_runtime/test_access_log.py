"""A request's line in the log has what all parts of a service have reported of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from vitrine_vlm.service_runtime.access_log import access_line, report, report_more, report_peer, report_slowest


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if hasattr(record, "fields")]


async def item(encoder: str, prefill_ms: float) -> None:
    report_peer("encoder", encoder)
    report_more(tokens=2)
    await asyncio.sleep(0)
    report_slowest({"forward_ms": prefill_ms, "queue_ms": 0.0})


async def test_tasks_of_a_request_report_into_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report(lost="without a request")
    with access_line("POST /v1/chat/completions", done=200):
        report(model="m")
        await asyncio.gather(item("a:1", 2.04), item("b:2", 3.06), item("a:1", 1.0))
    (line,) = fields(caplog)
    assert line.pop("elapsed_ms") >= 0
    assert line == {"status": 200, "model": "m", "encoder": ("a:1", "b:2"), "tokens": 6, "forward_ms": 3.1}
    assert caplog.messages[0].startswith("POST /v1/chat/completions: 200 in ")
    assert caplog.messages[0].endswith(" ms model=m encoder=a:1,b:2 tokens=6 forward_ms=3.1")


async def test_a_line_of_a_request_that_was_cancelled_or_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for error in (asyncio.CancelledError, ValueError):
        with pytest.raises(error), access_line("Encode"):
            raise error
    assert [line["status"] for line in fields(caplog)] == ["CANCELLED", "failed"]
