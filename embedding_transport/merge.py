"""Several asynchronous streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """A stream ended, or failed with `error`."""

    error: Exception | None


async def merged(streams: Sequence[AsyncGenerator[T]], drop: Callable[[T], None]) -> AsyncGenerator[T]:
    """What the streams yield, as it comes. The first error of any ends all; so does closing this one.

    Args:
        drop: called with everything that was read and then not taken.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield event
        return
    read: asyncio.Queue[T | _End] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    read.put_nowait(event)
            read.put_nowait(_End(None))
        except Exception as error:
            read.put_nowait(_End(error))

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            found = await read.get()
            if not isinstance(found, _End):
                yield found
            elif found.error is not None:
                raise found.error
            else:
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not read.empty():
            left = read.get_nowait()
            if not isinstance(left, _End):
                drop(left)
