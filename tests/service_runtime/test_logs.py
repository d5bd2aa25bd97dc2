"""Each line of the log says which request it is about, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from vitrine_vlm.service_runtime.logs import LogFormat, set_request_id, start_logging

log = logging.getLogger("vitrine.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def work(request_id: str) -> None:
    set_request_id(request_id)
    await asyncio.sleep(0)
    await asyncio.gather(*(asyncio.to_thread(log.info, "%s of %d", "part", number) for number in range(2)))


async def lines(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> list[str]:
    start_logging("info", log_format)
    log.debug("not shown")
    log.info("before")
    await asyncio.gather(work("one"), work("two\nline"))
    return capsys.readouterr().err.splitlines()


async def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    shown = await lines("text", capsys)
    assert len(shown) == 5
    assert shown[0].endswith("INFO vitrine.test before")
    assert sum(line.endswith("INFO vitrine.test ['one'] part of 0") for line in shown) == 1
    assert sum(line.endswith(r"INFO vitrine.test ['two\nline'] part of 1") for line in shown) == 1


async def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = (json.loads(line) for line in await lines("json", capsys))
    assert (first["level"], first["logger"], first["message"]) == ("info", "vitrine.test", "before")
    assert first["time"].endswith("+00:00") and "request_id" not in first
    assert sorted(line["request_id"] for line in others) == ["one", "one", "two\nline", "two\nline"]
    try:
        raise ValueError("with its trace")
    except ValueError:
        log.exception("failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("error", "failed")
    assert "ValueError: with its trace" in line["exception"]
