"""Events of the engine's thread reach their event loops in order, even if some of them fail."""

from __future__ import annotations

import asyncio
from typing import Any

from vitrine_vlm.llm_worker.engine.events import Event, KvNeeded
from vitrine_vlm.llm_worker.engine.outbox import Outbox


class Received:
    """A subscriber that keeps what it receives, and fails for token 13."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: list[Event] = []
        self.is_first = asyncio.Event()

    def receive(self, event: Event) -> None:
        if event == KvNeeded(13):
            raise ValueError
        self.events.append(event)
        self.is_first.set()


async def test_all_arrive_in_order_and_one_that_fails_does_not_affect_the_others() -> None:
    loop, outbox = asyncio.get_running_loop(), Outbox()
    one, other = Received(loop), Received(loop)
    failed: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: failed.append(context))
    outbox.subscribe(1, one)
    outbox.subscribe(2, other)
    for token in (1, 13, 2):
        outbox.put(1, KvNeeded(token))
        outbox.put(2, KvNeeded(token + 10))
    await asyncio.to_thread(outbox.send)
    await asyncio.sleep(0.01)
    assert one.events == [KvNeeded(1), KvNeeded(2)]
    assert other.events == [KvNeeded(11), KvNeeded(23), KvNeeded(12)]
    assert isinstance(failed[0]["exception"], ValueError)
    await asyncio.to_thread(outbox.send)
    await asyncio.sleep(0.01)
    assert len(one.events) == 2


async def test_what_was_put_before_the_end_still_arrives_and_nothing_after_it() -> None:
    outbox, subscriber = Outbox(), Received(asyncio.get_running_loop())
    outbox.subscribe(1, subscriber)
    outbox.put(1, KvNeeded(1))
    outbox.unsubscribe(1)
    outbox.put(1, KvNeeded(2))
    outbox.send()
    await asyncio.sleep(0.01)
    assert subscriber.events == [KvNeeded(1)]


async def test_a_closed_loop_keeps_no_other_from_receiving() -> None:
    closed, outbox = asyncio.new_event_loop(), Outbox()
    closed.close()
    gone, here = Received(closed), Received(asyncio.get_running_loop())
    for key, subscriber in enumerate((gone, here)):
        outbox.subscribe(key, subscriber)
        outbox.put(key, KvNeeded(0))
    await asyncio.to_thread(outbox.send)
    await asyncio.wait_for(here.is_first.wait(), 5)
    assert gone.events == []
