"""Which task a cancellation is meant for, and work that is cancelled by an event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


def is_own_cancellation() -> bool:
    """Whether a CancelledError is meant for this task, and not only for what the task awaited.

    A cancelled future raises one, too, and so does grpc when a call or its channel was closed.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


@asynccontextmanager
async def running_until(event: asyncio.Event, work: Awaitable[T]) -> AsyncGenerator[asyncio.Future[T]]:
    """Runs `work` until it is done or the event is set, and yields its future then.

    Leaving the context cancels work that still runs.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        yield working
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
