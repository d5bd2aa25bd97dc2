"""How long the tower will be busy with the batches that are in flight, by the cost model."""

from __future__ import annotations

import time
from collections.abc import Callable

from vitrine_vlm.encoder_service.engine.batch import QueuedItem


class InFlightBatches:
    """Batches that were built and have not ended, in this order; each is known by its first item.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[QueuedItem, float] = {}
        self._front_since = 0.0

    @property
    def left_s(self) -> float:
        """Seconds until all batches should have ended; below 0 once they take longer."""
        if not self._seconds:
            return 0.0
        return sum(self._seconds.values()) - (self._clock() - self._front_since)

    @property
    def front(self) -> tuple[float, float] | None:
        """Seconds for which the batch in front has been there, and that it should take; None without one."""
        expected_s = next(iter(self._seconds.values()), None)
        return None if expected_s is None else (self._clock() - self._front_since, expected_s)

    def add(self, items: list[QueuedItem], seconds: float) -> None:
        """Adds a batch that should take so many seconds."""
        if not self._seconds:
            self._front_since = self._clock()
        self._seconds[items[0]] = seconds

    def remove(self, items: list[QueuedItem]) -> None:
        """Removes a batch that has ended, well or not."""
        if next(iter(self._seconds), None) is items[0]:
            self._front_since = self._clock()
        del self._seconds[items[0]]
