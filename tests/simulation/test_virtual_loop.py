"""The clock that jumps: asyncio's own tasks, timeouts and executors over it."""

from __future__ import annotations

import asyncio
import time

import pytest

from vitrine_vlm.simulation.virtual_loop import NothingLeft, VirtualLoop, new_virtual_loop


def test_hours_pass_at_once_and_equal_moments_keep_their_order() -> None:
    loop, woken = new_virtual_loop(), []

    async def sleep(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((name, round(loop.time(), 6)))

    async def main() -> None:
        await asyncio.gather(sleep("a", 7200), sleep("b", 3600), sleep("c", 7200), sleep("d", 0))

    begin = time.process_time()
    loop.run(main())
    assert woken == [("d", 0.0), ("b", 3600.0), ("a", 7200.0), ("c", 7200.0)]
    assert time.process_time() - begin < 1


def test_timeouts_cancellations_and_thousands_of_cancelled_timers() -> None:
    loop = new_virtual_loop()

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        for _ in range(5000):
            loop.call_later(300, pytest.fail).cancel()
        assert len(loop._timers) < 3000
        until = loop.time() + 1e-15  # less than the clock resolves at 5 s: waiting for it ends all the same
        while loop.time() <= until:
            await asyncio.sleep(0)
        return loop.time()

    assert loop.run(main()) == pytest.approx(5)


def test_waiting_for_a_moment_ends_then_and_may_be_cancelled() -> None:
    loop = new_virtual_loop()

    async def wait(seconds: float) -> float:
        await loop.after(seconds)
        return loop.time()

    async def main() -> None:
        early, late, given_up = (asyncio.create_task(wait(seconds)) for seconds in (2.0, 7.0, 5.0))
        assert await early == pytest.approx(2.0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert await late == pytest.approx(7.0), "the moment of the one that was given up has passed without harm"

    loop.run(main())


def test_what_an_executor_runs_takes_the_time_that_it_says() -> None:
    loop = new_virtual_loop()

    def work(seconds: float) -> float:
        loop.block(seconds)
        if seconds > 2:
            raise ValueError("too long")
        return loop.time()

    async def main() -> None:
        running = asyncio.create_task(asyncio.to_thread(work, 2.0))
        await asyncio.sleep(1)
        assert loop.time() == pytest.approx(1) and not running.done()
        assert await running == pytest.approx(2) == loop.time()
        with pytest.raises(ValueError, match="too long"):
            await asyncio.to_thread(work, 3.0)
        assert loop.time() == pytest.approx(5)

    loop.run(main())


def test_waiting_for_nothing_and_failing_callbacks_end_the_run() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async def fail(loop: VirtualLoop) -> None:
        loop.call_later(1, lambda: 1 // 0)
        await asyncio.sleep(10)

    with pytest.raises(NothingLeft):
        new_virtual_loop().run(wait())
    loop = new_virtual_loop()
    with pytest.raises(ZeroDivisionError):
        loop.run(fail(loop))


def test_a_task_that_nothing_awaits_and_that_fails_ends_the_run() -> None:
    async def divide() -> None:
        await asyncio.sleep(1)
        _ = 1 // 0

    async def main() -> None:
        asyncio.create_task(divide())  # noqa: RUF006 nothing keeps it, so that its end is noticed
        await asyncio.sleep(3600)

    loop = new_virtual_loop()
    with pytest.raises(RuntimeError, match="never retrieved") as caught:
        loop.run(main())
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and loop.time() < 2


def test_timers_that_are_left_are_kept_in_their_order_among_thousands_that_are_cancelled() -> None:
    loop, fired = new_virtual_loop(), list[int]()

    async def main() -> None:
        for number in range(3000):
            loop.call_later(100, fired.append, number)
            loop.call_later(50, pytest.fail).cancel()
        await asyncio.sleep(200)

    loop.run(main())
    assert fired == list(range(3000))
