"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Delays in seconds, each drawn between half a bound and the bound, which doubles from `first_s` up to `max_s`.

    The jitter keeps the many clients of one service that failed from coming back all at once.
    Source: "Exponential Backoff and Jitter" (AWS Architecture Blog), there called equal jitter.
    """

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._bound_s = first_s

    def next_s(self) -> float:
        """The next delay, seconds."""
        bound_s, self._bound_s = self._bound_s, min(2 * self._bound_s, self._max_s)
        return random.uniform(bound_s / 2, bound_s)

    async def pause(self) -> None:
        await asyncio.sleep(self.next_s())

    def reset(self) -> None:
        """Begins from `first_s` again: what failed before has worked since."""
        self._bound_s = self._first_s
