"""Delays between retries."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Delays in seconds, each drawn between half a bound and the bound, which doubles from `first_s` up to `max_s`.

    The jitter keeps the clients of a failed service from retrying all at the same time.
    Source: "Exponential Backoff and Jitter" (AWS Architecture Blog), there called equal jitter.
    """

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._bound_s = first_s

    def next_s(self) -> float:
        """Returns the next delay, in seconds."""
        bound_s, self._bound_s = self._bound_s, min(2 * self._bound_s, self._max_s)
        return random.uniform(bound_s / 2, bound_s)

    async def pause(self) -> None:
        await asyncio.sleep(self.next_s())

    def reset(self) -> None:
        """Starts from `first_s` again, after a success."""
        self._bound_s = self._first_s
