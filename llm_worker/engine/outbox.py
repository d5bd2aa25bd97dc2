"""What the engine's thread has to say to event loops: all of a step's news in one go, as waking a loop costs more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Outbox:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        """Has the loop call `function`, once `send` is called."""
        self._waiting.setdefault(loop, []).append(function)

    def send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for loop, functions in waiting.items():
            try:
                loop.call_soon_threadsafe(_call_soon, loop, functions)
            except RuntimeError:
                _log.debug("an event loop is closed: nobody hears of %d events", len(functions))


def _call_soon(loop: asyncio.AbstractEventLoop, functions: list[Callable[[], None]]) -> None:
    """One by one: what goes wrong in one of them is nothing to the others."""
    for function in functions:
        loop.call_soon(function)
