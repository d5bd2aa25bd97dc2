"""The number of requests that the engine holds, and its limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vitrine_vlm.errors import Overloaded

# Weight of the latest interval in their mean.
_WEIGHT = 0.1
_MAX_RETRY_AFTER_S = 60.0


class Capacity:
    """Safe to use from any thread. num_used: requests that are running or waiting.

    A refusal says when to come again: refused requests are counted as a queue, which gets shorter by one with each
    request that ends.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: returns monotonic seconds.
        """
        self.num_used = 0
        self._limit = limit
        self._lock = threading.Lock()
        self._clock = clock
        self._num_refused = 0
        self._mean_interval_s = 0.0
        self._last_end: float | None = None

    def check(self, num_requests: int = 1) -> None:
        """Refuses further requests where the limit would be passed.

        Raises:
            Overloaded: it would.
        """
        with self._lock:
            self._check(num_requests)

    def acquire(self) -> None:
        """Counts one more; raises as `check`."""
        with self._lock:
            self._check(1)
            self.num_used += 1

    def release(self) -> None:
        with self._lock:
            now = self._clock()
            if self._last_end is not None:
                self._mean_interval_s += _WEIGHT * (now - self._last_end - self._mean_interval_s)
            self._last_end = now
            self.num_used -= 1
            self._num_refused = max(0, self._num_refused - 1) if self.num_used else 0

    def _check(self, num_requests: int) -> None:
        too_many = self.num_used + num_requests - self._limit
        if too_many > 0:
            self._num_refused += num_requests
            retry_after_s = min(self._mean_interval_s * max(self._num_refused, too_many), _MAX_RETRY_AFTER_S)
            raise Overloaded(
                f"{self.num_used} requests are running or waiting, the limit is {self._limit}: try again later",
                retry_after_s=retry_after_s,
            )
