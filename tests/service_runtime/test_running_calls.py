"""Requests in flight can be refused, waited for, and ended with an error of their own."""

from __future__ import annotations

import asyncio

import pytest

from vitrine_vlm.service_runtime.running_calls import RunningCalls


class Unavailable(Exception):
    pass


async def serve(calls: RunningCalls, done: asyncio.Event) -> str:
    with calls.track():
        await done.wait()
        return "answer"


async def started(calls: RunningCalls, done: asyncio.Event) -> asyncio.Task[str]:
    task = asyncio.create_task(serve(calls, done))
    await asyncio.sleep(0)
    return task


async def test_refused_requests_fail_and_those_in_flight_go_on() -> None:
    calls, done = RunningCalls(), asyncio.Event()
    running = await started(calls, done)
    calls.refuse(lambda: Unavailable("closing"))
    with pytest.raises(Unavailable, match="closing"):
        await serve(calls, done)
    assert calls.count == 1
    assert not await calls.idle(0.01)
    done.set()
    assert await calls.idle(1)
    assert await running == "answer"


async def test_all_end_with_an_error_that_can_be_handled() -> None:
    calls = RunningCalls()
    running = [await started(calls, asyncio.Event()) for _ in range(3)]
    calls.end(lambda: Unavailable("failed"))
    errors = await asyncio.gather(*running, return_exceptions=True)
    assert [str(error) for error in errors] == ["failed"] * 3
    assert len({id(error) for error in errors}) == 3, "each has an error, and a traceback, of its own"
    assert calls.count == 0

    async def handling() -> str:
        try:
            return await serve(calls, asyncio.Event())
        except Unavailable:
            await asyncio.sleep(0)  # what answers the client may wait
            return "503"

    assert await handling() == "503"


async def test_after_its_end_a_task_is_not_cancelled_any_more() -> None:
    calls = RunningCalls()

    async def handling() -> str:
        try:
            return await serve(calls, asyncio.Event())
        except Unavailable:
            await asyncio.sleep(0)
            return "503"

    running = asyncio.create_task(handling())
    await asyncio.sleep(0)
    calls.end(lambda: Unavailable("failed"))
    assert await running == "503"


async def test_a_client_that_goes_away_at_the_same_moment_cancels() -> None:
    calls = RunningCalls()
    running = await started(calls, asyncio.Event())
    running.cancel()
    calls.end(lambda: Unavailable("failed"))
    with pytest.raises(asyncio.CancelledError):
        await running
