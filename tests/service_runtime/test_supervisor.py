"""Background work has an owner, which notices every unexpected end."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from vitrine_vlm.service_runtime.child_process import Child, ChildFailed
from vitrine_vlm.service_runtime.supervisor import Failure, ServiceFailed, Supervisor


async def for_ever() -> None:
    await asyncio.Event().wait()


async def failing(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def seen(supervisor: Supervisor) -> Failure:
    return await asyncio.wait_for(supervisor.failed(), 10)


async def test_an_exception_is_logged_with_name_and_traceback_and_is_the_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor = Supervisor()
    reported: list[Failure] = []
    supervisor.on_failure(reported.append)
    supervisor.start_task("steady", for_ever())
    supervisor.start_task("shaky", failing(ValueError("by accident")))
    failure = await seen(supervisor)
    assert (failure.name, str(failure)) == ("shaky", "shaky ended with ValueError")
    assert reported == [failure]
    assert supervisor.names() == ["steady"], "the others go on: the supervisor does not end the process"
    (record,) = caplog.records
    assert "shaky" in record.message and record.exc_info is not None and "by accident" in str(record.exc_info[1])
    with pytest.raises(ValueError, match="by accident"):
        supervisor.check()
    late: list[Failure] = []
    supervisor.on_failure(late.append)
    assert late == [failure]
    await supervisor.close()


async def test_a_loop_may_not_return_and_a_job_may(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor()
    await supervisor.start_job("job", asyncio.sleep(0))
    await asyncio.sleep(0)
    assert supervisor.failure is None and not caplog.records
    supervisor.start_task("loop", asyncio.sleep(0))
    failure = await seen(supervisor)
    assert (failure.name, failure.error) == ("loop", None)
    with pytest.raises(ServiceFailed, match="loop"):
        supervisor.check()
    other = Supervisor()
    other.start_job("job", failing(ValueError("no")))
    assert (await seen(other)).name == "job"


async def test_a_task_that_others_cancel_is_a_failure_and_one_that_is_stopped_is_not() -> None:
    supervisor = Supervisor()
    stopped = supervisor.start_task("stopped", for_ever())
    await supervisor.stop(stopped)
    assert stopped.cancelled() and supervisor.failure is None and supervisor.names() == []
    supervisor.start_task("cancelled", for_ever()).cancel()
    assert (await seen(supervisor)).name == "cancelled"


async def test_only_the_first_end_is_the_failure_and_all_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor()

    def broken(failure: Failure) -> None:
        raise RuntimeError("a callback's own")

    reported: list[str] = []
    supervisor.on_failure(broken)
    supervisor.on_failure(lambda failure: reported.append(failure.name))
    for name in ("first", "second"):
        supervisor.start_task(name, failing(ValueError(name)))
    await seen(supervisor)
    await asyncio.sleep(0.01)
    assert reported == ["first"]
    assert [name for name in ("first", "second", "a callback's own") if name in caplog.text] == [
        "first",
        "second",
        "a callback's own",
    ]


async def test_what_a_task_raises_while_it_is_stopped_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def clumsy() -> None:
        try:
            await for_ever()
        finally:
            raise ValueError("on the way out")

    supervisor = Supervisor()
    task = supervisor.start_task("clumsy", clumsy())
    await asyncio.sleep(0)
    await supervisor.stop(task)
    assert supervisor.failure is None
    assert "clumsy failed while it was stopped" in caplog.text and "on the way out" in caplog.text


async def test_a_thread_that_ends_is_noticed_unless_its_end_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor()
    go = threading.Event()

    def wait() -> None:
        go.wait(10)

    expected = supervisor.start_thread("expected", wait)
    assert (expected.name, supervisor.names()) == ("expected", ["expected"])
    supervisor.expect_end(expected)
    go.set()
    await asyncio.to_thread(expected.join)
    await asyncio.sleep(0.01)
    assert supervisor.failure is None

    def broken() -> None:
        raise ValueError("in a thread")

    supervisor.start_thread("broken", broken)
    failure = await seen(supervisor)
    assert failure.name == "broken" and "in a thread" in caplog.text


async def test_a_child_that_ends_is_noticed_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    supervisor = Supervisor()
    child = await Child.start("rank 1", ["short"])
    supervisor.watch_child(child, can_unwind=False)
    assert supervisor.names() == ["rank 1"]
    failure = await seen(supervisor)
    assert (failure.name, failure.can_unwind) == ("rank 1", False)
    with pytest.raises(ChildFailed, match="exit code 3"):
        supervisor.check()
    await child.stop(1.0)


async def test_work_is_cancelled_by_a_failure() -> None:
    supervisor = Supervisor()
    assert await supervisor.unless_failed(asyncio.sleep(0, "done")) == "done"
    supervisor.start_task("shaky", failing(ValueError("by accident")))
    with pytest.raises(ValueError, match="by accident"):
        await supervisor.unless_failed(for_ever())


async def test_close_stops_the_last_first_and_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    ended: list[str] = []

    async def noting(name: str) -> None:
        try:
            await for_ever()
        finally:
            ended.append(name)

    supervisor = Supervisor()
    for name in ("first", "second"):
        supervisor.start_task(name, noting(name))
    await asyncio.sleep(0)
    await supervisor.close()
    assert ended == ["second", "first"]
    assert supervisor.failure is None and supervisor.names() == [] and not caplog.records
