"""Large bodies are read by a process that limits itself, and what it does to itself ends one request."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from tests.service_runtime import body_process_to_end
from vitrine_vlm.errors import BadRequest, InternalError, TooManyItems, WorkerUnavailable
from vitrine_vlm.service_runtime import http_requests, progress
from vitrine_vlm.service_runtime.body_process import Kept
from vitrine_vlm.service_runtime.body_reader import BodyReader
from vitrine_vlm.service_runtime.limited_processes import LimitedProcesses, TookTooMuch
from vitrine_vlm.service_runtime.memory_file import MemoryFile
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS
from vitrine_vlm.service_runtime.running_calls import RunningCalls

BODY = b"0123456789" * 1000


@pytest.fixture
async def reader() -> AsyncIterator[BodyReader]:
    reader, application = BodyReader(body_process_to_end.__name__), web.Application()
    reader.end_with(application)
    application.freeze()  # otherwise its end is none
    yield reader
    await application.cleanup()


async def ask(
    reader: BodyReader, do: str = "echo", http: web.Request | None = None, **arguments: Any
) -> tuple[Any, list[bytes]]:
    def use(found: Any, kept: Kept) -> tuple[Any, list[bytes]]:
        return found, [kept(*place) for place in found["kept"]]

    body = MemoryFile()
    body.append(BODY)
    return await reader.read(http or make_mocked_request("POST", "/"), body, {"do": do, **arguments}, use)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_one_process_answers_and_runs_after_others(reader: BodyReader) -> None:
    answers = await asyncio.gather(*(ask(reader) for _ in range(3)))
    assert [kept for _, kept in answers] == [[BODY[::-1], BODY]] * 3
    assert len({found["pid"] for found, _ in answers}) == 1
    assert answers[0][0]["nice"] == min(19, os.nice(0) + 10)
    before = open_files()
    await ask(reader)
    assert open_files() == before


@pytest.mark.parametrize(("do", "limit"), [("spin", "more than 30 s"), ("grow", "too much memory")])
async def test_a_body_that_takes_too_much(reader: BodyReader, do: str, limit: str) -> None:
    (first, _), (second, _) = await ask(reader), await ask(reader)
    assert first["pid"] == second["pid"]
    with pytest.raises(BadRequest, match=f"the body of {len(BODY)} bytes takes {limit}"):
        await ask(reader, do)
    (found, _) = await ask(reader)
    assert found["pid"] != first["pid"]


@pytest.mark.parametrize("do", ["stop", "echo"])
async def test_a_process_that_does_nothing_is_ended(
    reader: BodyReader, do: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, _) = await ask(reader)
    monkeypatch.setattr(progress, "_LOOK_S", 0.05)
    if do == "echo":
        os.kill(first["pid"], signal.SIGSTOP)
    before = open_files()
    with pytest.raises(InternalError, match=r"body_process_to_end did nothing for 0.5 s and was ended: try again"):
        await ask(reader, do)
    assert open_files() == before - 2, "its connection and its output"
    (found, _) = await ask(reader)
    assert found["pid"] != first["pid"]


async def test_a_process_that_hardly_does_anything_is_ended(
    reader: BodyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(reader)
    monkeypatch.setattr(progress, "_LEAST_CPU_S", 0.0)
    monkeypatch.setattr(progress, "_WALL_PER_CPU_S", 0.02)  # of 35 s
    with pytest.raises(BadRequest, match=f"the body of {len(BODY)} bytes takes more than 30 s"):
        await ask(reader, "try")


async def test_an_ending_service_waits_for_no_process_that_was_stopped() -> None:
    reader, application = BodyReader(body_process_to_end.__name__), web.Application()
    reader.end_with(application)
    application.freeze()
    (found, _) = await ask(reader)
    os.kill(found["pid"], signal.SIGSTOP)
    async with asyncio.timeout(30):
        await application.cleanup()
    assert not Path(f"/proc/{found['pid']}").exists()


def test_a_process_that_works_behind_the_end_is_ended() -> None:
    """Also one that is started while its service ends."""
    processes = LimitedProcesses(body_process_to_end.__name__, 1.0)
    processes.kill()
    with MemoryFile() as body, MemoryFile() as kept, pytest.raises(TookTooMuch):
        processes.ask('{"do": "stop"}', (body.fd, kept.fd))
    assert not processes._idle and not processes._working


async def test_errors_of_the_process(reader: BodyReader) -> None:
    with pytest.raises(TooManyItems, match="more than 0 items") as refused:
        await ask(reader, "refuse")
    assert refused.value.param == "items"
    with pytest.raises(RuntimeError, match="IndexError"):
        await ask(reader, "fault", index=len(BODY))


async def test_a_process_that_was_killed_between_bodies_fails_none(reader: BodyReader) -> None:
    (found, _) = await ask(reader)
    os.kill(found["pid"], signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, found["pid"], os.WEXITED | os.WNOWAIT)
    assert (await ask(reader))[1] == [BODY[::-1], BODY]


async def test_a_process_that_is_killed_is_not_the_bodys_fault(reader: BodyReader) -> None:
    (found, _) = await ask(reader)
    stopped = asyncio.create_task(ask(reader, "stop"))
    async with asyncio.timeout(30):
        while memory_files() < 2:
            await asyncio.sleep(0.01)
    os.kill(found["pid"], signal.SIGKILL)
    with pytest.raises(InternalError, match="body_process_to_end was killed: try again"):
        await stopped
    assert (await ask(reader))[1] == [BODY[::-1], BODY]


async def test_ctrl_c_leaves_the_process_alone(reader: BodyReader) -> None:
    (found, _) = await ask(reader)
    assert os.getpgid(found["pid"]) != os.getpgid(0)


def memory_files() -> int:
    """Memory files that are open, and so take memory, in this process."""
    names = (os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum("vitrine-bytes" in name for name in names)


async def test_a_body_whose_client_leaves_takes_no_memory_behind_others(reader: BodyReader) -> None:
    await ask(reader)
    first, second = (asyncio.create_task(ask(reader, do)) for do in ("stop", "echo"))
    async with asyncio.timeout(30):
        while memory_files() < 3:  # two of the first one
            await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        while memory_files() > 2:
            await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_the_process_ends_with_its_service_in_the_middle_of_a_body() -> None:
    """It could go on for 30 s of CPU time behind the end of its service; this one would never end."""
    reader, application = BodyReader(body_process_to_end.__name__), web.Application()
    reader.end_with(application)
    application.freeze()
    (found, _) = await ask(reader)
    stopped = asyncio.create_task(ask(reader, "stop"))
    async with asyncio.timeout(30):
        while memory_files() < 2:
            await asyncio.sleep(0.01)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        await application.cleanup()
        while memory_files() or Path(f"/proc/{found['pid']}").exists():
            await asyncio.sleep(0.01)


async def test_an_ending_service_waits_for_no_body(reader: BodyReader) -> None:
    calls, requests = RunningCalls(), [make_mocked_request("POST", "/") for _ in range(2)]
    for http in requests:
        http[http_requests._BODY] = http_requests._Body(DEFAULT_LIMITS, calls)
    asked = [asyncio.create_task(ask(reader, "stop", http)) for http in requests]
    async with asyncio.timeout(30):
        while memory_files() < 3:  # two of the first one
            await asyncio.sleep(0.01)
        calls.end(lambda: WorkerUnavailable("the service is ending"))
        for each in asked:
            with pytest.raises(WorkerUnavailable):
                await each
        with pytest.raises(WorkerUnavailable):
            await ask(reader, "echo", requests[0])
        while memory_files() > 2:
            await asyncio.sleep(0.01)


def test_what_lies_behind_the_end_is_not_read() -> None:
    with MemoryFile() as file:
        assert (file.append(b"abc"), file.append(b"de")) == ((0, 3), (3, 5))
        assert (file.read(), file.read(1, 4)) == (b"abcde", b"bcd")
        for begin, end in ((0, 6), (4, 3), (6, 7), (0, 2**62)):
            with pytest.raises(EOFError):
                file.read(begin, end)
