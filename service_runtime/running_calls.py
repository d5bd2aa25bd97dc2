"""The requests that a service has in flight: how many, and how all of them end at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Call:
    task: asyncio.Task[object]
    num_cancelled_before: int
    is_ended: bool = False


class RunningCalls:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._make_error: Callable[[], Exception] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        return len(self._calls)

    @contextmanager
    def track(self) -> Iterator[None]:
        """One is in flight inside, on the current task.

        Raises:
            Exception: what `refuse` or `end` was given; the latter in the middle of the request, too.
        """
        if self._make_error is not None:
            raise self._make_error()
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task, task.cancelling())
        self._calls.add(call)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError as error:
            # As asyncio.timeout does: a request that was cancelled from elsewhere, too, stays cancelled.
            if call.is_ended and task.uncancel() <= call.num_cancelled_before and self._make_error is not None:
                raise self._make_error() from error
            raise
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def refuse(self, make_error: Callable[[], Exception]) -> None:
        """Requests that come from now on fail with this error; those in flight go on."""
        self._make_error = make_error

    def end(self, make_error: Callable[[], Exception]) -> None:
        """All requests fail with this error, those in flight as well."""
        self.refuse(make_error)
        for call in self._calls:
            if not call.is_ended:
                call.is_ended = True
                call.task.cancel()

    async def idle(self, timeout_s: float) -> bool:
        """Waits until none is in flight; False if that took longer than `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
