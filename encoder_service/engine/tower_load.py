"""How busy the tower is: encoders are scaled by it, as a queue is short however many of them are idle."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Two readings of a scraper that comes every 15 s; shorter, and single batches would show.
WINDOW_S = 30.0


class TowerLoad:
    """The part of the last 30 s, or of the time since the start, in which the tower has computed.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._busy_s = 0.0
        self._batches: deque[tuple[float, float]] = deque()

    def add(self, forward_s: float) -> None:
        """Counts a batch that has just ended. forward_s: how long it took."""
        self._batches.append((self._clock(), forward_s))
        self._busy_s += forward_s
        self._remove_old()

    @property
    def value(self) -> float:
        """From 0 to 1."""
        self._remove_old()
        elapsed_s = min(self._clock() - self._started_at, WINDOW_S)
        return min(1.0, self._busy_s / elapsed_s) if elapsed_s > 0 else 0.0

    def _remove_old(self) -> None:
        while self._batches and self._batches[0][0] < self._clock() - WINDOW_S:
            self._busy_s -= self._batches.popleft()[1]
        if not self._batches:
            self._busy_s = 0.0  # without the rounding errors of adding and subtracting
