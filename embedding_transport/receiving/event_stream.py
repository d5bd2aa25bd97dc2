"""One asynchronous stream of the events that several tasks emit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vitrine_vlm.service_runtime.cancellation import is_own_cancellation

T = TypeVar("T")

# Events that may wait for a slow reader. The task that emits one more waits, and with it the call it reads from.
_MAX_WAITING = 8


@dataclass(frozen=True)
class _End:
    """A task has ended; with `error` if it failed."""

    error: BaseException | None


class EventStream(Generic[T]):
    """A stream that is read once, on one event loop.

    Args:
        discard: called with every event that was emitted but not read.
    """

    def __init__(self, discard: Callable[[T], None]) -> None:
        self._discard = discard
        self._waiting: asyncio.Queue[T | _End] = asyncio.Queue(_MAX_WAITING)
        self._tasks: list[asyncio.Task[None]] = []

    async def read(self, begin: Callable[[], Awaitable[None]]) -> AsyncGenerator[T]:
        """Yields events as they are emitted until all tasks have ended. An error, or closing, ends all tasks.

        Args:
            begin: awaited first; it starts the first tasks and emits nothing itself.
        """
        num_ended = 0
        event: T | _End | None = None
        try:
            await begin()
            while num_ended < len(self._tasks):
                event = await self._waiting.get()
                if not isinstance(event, _End):
                    yield event
                elif event.error is not None:
                    raise event.error
                else:
                    num_ended += 1
        finally:
            event = None  # otherwise the error and this frame would refer to each other
            if num_ended < len(self._tasks):
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
            while not self._waiting.empty():
                unread = self._waiting.get_nowait()
                if not isinstance(unread, _End):
                    self._discard(unread)

    def start(self, work: Callable[[], Awaitable[None]], at_end: Callable[[], None] = lambda: None) -> None:
        """Runs `work` as a task of this stream; called from `begin` or from another of its tasks.

        Args:
            at_end: called once the task has ended, also if it was cancelled before it began.
        """
        task = asyncio.create_task(self._run(work))
        task.add_done_callback(lambda _: at_end())
        self._tasks.append(task)

    async def emit(self, event: T) -> None:
        """Passes an event from one of the tasks to the reader; waits while too many events are unread."""
        try:
            await self._waiting.put(event)
        except asyncio.CancelledError:
            self._discard(event)
            raise

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and is_own_cancellation():
                raise
            await self._waiting.put(_End(error))
        else:
            await self._waiting.put(_End(None))
