"""How many calls are under way, for whoever wants to end when none is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


class RunningCalls:
    """Belongs to one event loop. count: under way now."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """One is under way inside."""
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when none is under way."""
        await self._idle.wait()

    async def drained(self, timeout_s: float) -> None:
        """Returns when none is under way, or with a line in the log after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.idle()
        except TimeoutError:
            _log.warning("%d requests still ran after %g s and are cut off", self.count, timeout_s)
