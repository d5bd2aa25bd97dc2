"""Each line of the log says which request it is about, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator

import pytest

from vitrine_vlm.service_runtime.log_limits import BUDGET_CHARS, WINDOW_S, LimitedHandler, LimitedLines, printable
from vitrine_vlm.service_runtime.logs import LogFormat, harmless, set_request_id, start_logging

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


# Without a lone surrogate, which pytest-xdist could not report.
HOSTILE = "id\n2026-01-01 00:00:00,000 ERROR root forged\r\x1b[2J\x9b\u2028\u202e\x00\x7f"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_text_of_clients_forges_no_line(log_format: LogFormat, capfd: pytest.CaptureFixture[str]) -> None:
    start_logging("info", log_format)
    set_request_id(HOSTILE)
    log.info("refused %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    set_request_id("")
    written = capfd.readouterr().err
    assert not set(written) & set("\r\x1b\x9b\u2028\u202e\x00")
    assert printable("\ud800") == "\\ud800"
    begins = [line for line in written.split("\n") if line and not line.startswith("    ")]
    assert len(begins) == 2 and not any(line.startswith("2026-01-01 00:00:00,000") for line in begins)
    assert written.count("forged") == 4


@pytest.mark.parametrize("text", ["short", "x" * 20_000, "\n" * 20_000])
def test_a_place_that_writes_again_and_again_is_limited(
    text: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    start_logging("info", "text")
    for _ in range(1000):
        log.warning("refused %s", text)
    log.warning("another place is not limited by it")
    written = capfd.readouterr().err
    assert "another place" in written
    assert BUDGET_CHARS / 2 < len(written) < 3 * BUDGET_CHARS
    num_refused = written.count(" refused ")
    now += WINDOW_S
    log.warning("later")
    assert (
        f"WARNING vitrine.test {1000 - num_refused} more lines like {f'refused {text}'[:100]!r} in the last 10 s"
        in capfd.readouterr().err
    )


def test_what_was_left_out_is_counted_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    start_logging("info", "json")
    for _ in range(1000):
        log.info("again")
    handler = logging.getLogger().handlers[-1]
    assert isinstance(handler, LimitedHandler)
    handler.close()
    *shown, count = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    assert count == f"{1000 - len(shown)} more lines like 'again' in the last 10 s"


def test_lines_in_another_programs_log_are_limited_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are that program's in form and place; it is not limited itself."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    program, own = logging.getLogger("a_program"), logging.getLogger("a_part.of_it")
    part = logging.getLogger("a_part")
    part.handlers, part.propagate = [LimitedLines(program)], False
    program.setLevel(logging.INFO)
    try:
        for number in range(1000):
            own.warning("request %d: %s\nnext line", number, "a" * 100)
        own.warning("another place")
        shown = [record.getMessage() for record in caplog.records]
        assert sum(map(len, shown)) < 2 * BUDGET_CHARS and len(shown) > 100
        assert shown[0] == f"request 0: {'a' * 100}\\nnext line" and shown[-1] == "another place"
        program.warning("not limited")
        clock[0] += WINDOW_S
        caplog.clear()
        try:
            raise ValueError("b" * 10 * BUDGET_CHARS)
        except ValueError:
            own.exception("failed")
        count, failed = caplog.records
        assert count.getMessage().startswith(f"{1000 - len(shown) + 1} more lines like 'request 0: aaa")
        assert (failed.name, failed.getMessage()) == ("a_part.of_it", "failed")
        assert len(logging.Formatter().format(failed)) < BUDGET_CHARS
    finally:
        part.handlers, part.propagate = [], True


def test_a_traceback_has_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    start_logging("info", "text")
    try:
        raise ValueError("x" * 1_000_000)
    except ValueError:
        log.exception("failed")
    assert len(capfd.readouterr().err) < 2 * BUDGET_CHARS


def test_what_fails_harmlessly_is_logged_and_what_ends_a_task_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: BaseException) -> None:
        with harmless("a metric"):
            raise error

    fail(ValueError("no such label"))
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("ERROR", "a metric failed")
    assert record.exc_info is not None and str(record.exc_info[1]) == "no such label"
    with pytest.raises(asyncio.CancelledError):
        fail(asyncio.CancelledError())
    assert len(caplog.records) == 1
