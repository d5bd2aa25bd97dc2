"""News of the engine's thread reach their event loops, in order, whatever happens to some of them."""

from __future__ import annotations

import asyncio
from typing import Any

from llm_worker.engine.outbox import Outbox


async def test_all_are_heard_in_order_and_one_that_fails_is_nothing_to_the_others() -> None:
    loop, outbox = asyncio.get_running_loop(), Outbox()
    heard: list[int] = []
    failed: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: failed.append(context))

    def fail() -> None:
        raise ValueError

    outbox.put(loop, lambda: heard.append(1))
    outbox.put(loop, fail)
    outbox.put(loop, lambda: heard.append(2))
    await asyncio.to_thread(outbox.send)
    await asyncio.sleep(0.01)
    assert heard == [1, 2]
    assert isinstance(failed[0]["exception"], ValueError)
    await asyncio.to_thread(outbox.send)
    await asyncio.sleep(0.01)
    assert heard == [1, 2]


async def test_a_closed_loop_keeps_nobody_else_from_hearing() -> None:
    closed, outbox = asyncio.new_event_loop(), Outbox()
    closed.close()
    heard = asyncio.Event()
    outbox.put(closed, heard.clear)
    outbox.put(asyncio.get_running_loop(), heard.set)
    await asyncio.to_thread(outbox.send)
    await asyncio.wait_for(heard.wait(), 5)
