"""How long the tower will be busy with the batches it has been given, by the cost model's word."""

from __future__ import annotations

import time
from collections.abc import Callable

from vitrine_vlm.encoder_service.engine.batch import Entry


class UnderWay:
    """Batches from being formed to their end, in this order; the first entry stands for its batch.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[Entry, float] = {}
        self._front_since = 0.0

    @property
    def left_s(self) -> float:
        """Seconds until all should be through; below 0 once they take longer."""
        if not self._seconds:
            return 0.0
        return sum(self._seconds.values()) - (self._clock() - self._front_since)

    def begin(self, entries: list[Entry], seconds: float) -> None:
        if not self._seconds:
            self._front_since = self._clock()
        self._seconds[entries[0]] = seconds

    def end(self, entries: list[Entry]) -> None:
        """The batch is over, well or not."""
        if next(iter(self._seconds), None) is entries[0]:
            self._front_since = self._clock()
        del self._seconds[entries[0]]
