"""Waits that share a timer end as those of `asyncio.timeout` do."""

from __future__ import annotations

import asyncio

import pytest

from vitrine_vlm.service_runtime.shared_timeout import SharedTimeout

SECONDS = 0.1


async def late(timeout: SharedTimeout, delay_s: float = 0.0) -> float:
    """Waits for too long, `delay_s` from now; returns how long."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(delay_s)
    began = loop.time()
    with pytest.raises(TimeoutError), timeout():
        await asyncio.sleep(60)
    return loop.time() - began


def test_each_wait_has_its_own_time() -> None:
    async def run() -> list[float]:
        timeout = SharedTimeout(SECONDS)
        for _ in range(3):
            with timeout():
                await asyncio.sleep(0)
        return await asyncio.gather(*(late(timeout, delay_s) for delay_s in (0, 0.03, 0.05, 0.5)))

    assert all(SECONDS <= seconds < 60 for seconds in asyncio.run(run()))


def test_a_cancelled_wait_stays_cancelled() -> None:
    async def run() -> None:
        timeout = SharedTimeout(SECONDS)
        waiting = asyncio.create_task(late(timeout))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


def test_errors_pass() -> None:
    async def run() -> None:
        timeout = SharedTimeout(SECONDS)
        with pytest.raises(ZeroDivisionError), timeout():
            raise ZeroDivisionError
        await asyncio.sleep(2 * SECONDS)  # a wait that has ended is not cancelled

    asyncio.run(run())
