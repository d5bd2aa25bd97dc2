"""The requests in flight of a service: their number, and a way to end all of them."""

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
    """The requests in flight. It belongs to one event loop."""

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
        """Counts the current task's request as in flight inside the context.

        Raises:
            Exception: the error of `refuse` or `end`; that of `end` also in the middle of the request.
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
            # As in asyncio.timeout: a request that was also cancelled by its caller stays cancelled.
            if call.is_ended and task.uncancel() <= call.num_cancelled_before and self._make_error is not None:
                raise self._make_error() from error
            raise
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def refuse(self, make_error: Callable[[], Exception]) -> None:
        """Makes new requests fail with this error; requests in flight go on."""
        self._make_error = make_error

    def end(self, make_error: Callable[[], Exception]) -> None:
        """Makes all requests fail with this error, those in flight as well."""
        self.refuse(make_error)
        for call in self._calls:
            if not call.is_ended:
                call.is_ended = True
                call.task.cancel()

    async def idle(self, timeout_s: float) -> bool:
        """Waits until no request is in flight; returns False after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
