"""How long what waits for a pool of threads will take, by what they have done so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

_WEIGHT_OF_LAST = 0.2
_LONGEST_S = 60.0


class QueueTime:
    """Of a queue of work that is counted in units. Threads may use it together: an update that is lost does no harm.

    Args:
        num_threads: that work at once.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._unit_s = 0.0

    @contextmanager
    def work(self, num_units: int) -> Iterator[None]:
        """Measures the work of a thread on so many units, unless it ends by CancelledError: then it did fewer."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if not isinstance(sys.exception(), CancelledError):
                self.add(num_units, time.perf_counter() - begin)

    def add(self, num_units: int, seconds: float) -> None:
        """Counts work that has ended."""
        unit_s = seconds / num_units
        # The first one says more than none.
        self._unit_s += (_WEIGHT_OF_LAST if self._unit_s else 1.0) * (unit_s - self._unit_s)

    def seconds(self, num_waiting: int) -> float:
        """When units that wait will be done, from now on: a minute at most, and 0 as long as nothing is known."""
        return min(num_waiting * self._unit_s / self._num_threads, _LONGEST_S)
