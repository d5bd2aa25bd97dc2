"""Several tasks as one stream: everything arrives, the first error ends all, nothing that was emitted is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial

import pytest

from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream


class Task:
    """Emits numbers, then raises or waits for ever; notes that it has ended."""

    def __init__(self, *values: int, error: Exception | None = None, endless: bool = False) -> None:
        self.values, self.error, self.endless = values, error, endless
        self.num_emitted = 0
        self.ended = False

    async def run(self, stream: EventStream[int]) -> None:
        try:
            for value in self.values:
                await asyncio.sleep(0)
                await stream.emit(value)
                self.num_emitted += 1
            if self.endless:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.ended = True


def starting(stream: EventStream[int], *tasks: Task) -> Callable[[], Awaitable[None]]:
    async def begin() -> None:
        for task in tasks:
            stream.start(partial(task.run, stream))

    return begin


@pytest.mark.parametrize("tasks", [[Task(1, 2)], [Task(1, 2), Task(), Task(3)], []], ids=["one", "three", "none"])
async def test_everything_arrives(tasks: list[Task]) -> None:
    discarded: list[int] = []
    stream = EventStream(discarded.append)
    assert sorted([value async for value in stream.read(starting(stream, *tasks))]) == [
        *range(1, 1 + sum(len(each.values) for each in tasks))
    ]
    assert not discarded


async def test_the_first_error_ends_all_tasks() -> None:
    failing, endless = Task(1, error=KeyError("bad")), Task(2, 3, endless=True)
    stream = EventStream[int](lambda value: None)
    taken: list[int] = []
    with pytest.raises(KeyError, match="bad"):
        async for value in stream.read(starting(stream, failing, endless)):
            taken.append(value)
    assert 1 in taken
    assert failing.ended and endless.ended


async def test_what_was_emitted_and_not_read_is_discarded() -> None:
    first, second = Task(1, 2, 3), Task(4, endless=True)
    discarded: list[int] = []
    stream = EventStream(discarded.append)
    async with aclosing(stream.read(starting(stream, first, second))) as values:
        taken = [await anext(values)]
        await asyncio.sleep(0.01)
    assert sorted(taken + discarded) == [1, 2, 3, 4]
    assert first.ended and second.ended


async def test_a_slow_reader_blocks_the_task_and_waiting_events_are_discarded_too() -> None:
    task = Task(*range(1000))
    discarded: list[int] = []
    stream = EventStream(discarded.append)
    async with aclosing(stream.read(starting(stream, task))) as values:
        taken = [await anext(values) for _ in range(3)]
        await asyncio.sleep(0.05)
        num_emitted = task.num_emitted
    assert num_emitted < 20
    assert sorted(taken + discarded) == [*range(num_emitted + 1)]  # one was waiting to be emitted


async def test_a_task_may_start_others() -> None:
    stream = EventStream[int](lambda value: None)

    async def parent() -> None:
        stream.start(partial(Task(1, 2).run, stream))

    async def begin() -> None:
        stream.start(parent)

    assert [value async for value in stream.read(begin)] == [1, 2]


async def test_the_end_of_a_task_that_never_began_is_noticed() -> None:
    ended: list[str] = []
    stream = EventStream[int](lambda value: None)

    async def begin() -> None:
        stream.start(partial(Task(1).run, stream), lambda: ended.append("task"))
        raise KeyError("bad")

    with pytest.raises(KeyError, match="bad"):
        await anext(stream.read(begin))
    assert ended == ["task"]


async def test_a_cancellation_that_is_not_the_streams_own_reaches_the_reader() -> None:
    stream = EventStream[int](lambda value: None)

    async def work() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async def begin() -> None:
        stream.start(work)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(anext(stream.read(begin)), 5)
