"""One asynchronous stream of what several tasks emit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vitrine_vlm.service_runtime.cancellation import is_own_cancellation

T = TypeVar("T")

# Events that may wait for a slow reader; then the task that emits the next one waits, and with it its call.
_MAX_WAITING = 8


@dataclass(frozen=True)
class _End:
    """A task ended, or failed with `error`."""

    error: BaseException | None


class EventStream(Generic[T]):
    """Lives on one event loop, and is read once.

    Args:
        discard: called with every event that was emitted and is not read.
    """

    def __init__(self, discard: Callable[[T], None]) -> None:
        self._discard = discard
        self._waiting: asyncio.Queue[T | _End] = asyncio.Queue(_MAX_WAITING)
        self._tasks: list[asyncio.Task[None]] = []

    async def read(self, begin: Callable[[], Awaitable[None]]) -> AsyncGenerator[T]:
        """What the tasks emit, as it comes, until all have ended. The first error ends all; so does closing this one.

        Args:
            begin: awaited first; starts the first tasks and emits nothing itself.
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
            event = None  # an error whose traceback leads here would hold itself
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            while not self._waiting.empty():
                unread = self._waiting.get_nowait()
                if not isinstance(unread, _End):
                    self._discard(unread)

    def start(self, work: Callable[[], Awaitable[None]], at_end: Callable[[], None] = lambda: None) -> None:
        """Runs `work` as a task of this stream: from `begin`, or from another task of it.

        Args:
            at_end: called once it is over, also where it was cancelled before it began.
        """
        task = asyncio.create_task(self._run(work))
        task.add_done_callback(lambda _: at_end())
        self._tasks.append(task)

    async def emit(self, event: T) -> None:
        """Hands an event to the reader, from one of the tasks; waits while too many are waiting there."""
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
