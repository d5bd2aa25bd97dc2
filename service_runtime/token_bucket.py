"""A limit of an amount a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS = 60.0
# A part of a minute's amount: what rounding may leave missing after exactly the time that was stated.
_ROUNDING = 1e-9


class TokenBucket:
    """Holds at most one minute's amount, with which it begins, and refills at a constant rate.

    So a caller that was idle may take a whole minute's amount at once. An amount above that waits for a full bucket and
    leaves a debt, which the refill pays before anything else can be taken.

    Source: RFC 2697, section 3, one bucket of it, with the debt as an addition.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            per_minute: above 0.
            clock: returns seconds.
        """
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._filled_at = clock()

    def take(self, amount: float = 1.0) -> float:
        """Takes the amount and returns 0, or takes nothing and returns the seconds until it can be taken."""
        now = self._clock()
        refilled = self._level + (now - self._filled_at) * self.per_minute / _SECONDS
        self._level, self._filled_at = min(self.per_minute, refilled), now
        missing = min(amount, self.per_minute) - self._level
        if missing > self.per_minute * _ROUNDING:
            return missing * _SECONDS / self.per_minute
        self._level -= amount
        return 0.0
