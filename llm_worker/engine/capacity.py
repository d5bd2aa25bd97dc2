"""The number of requests that the engine holds, and its limit."""

from __future__ import annotations

import threading

from vitrine_vlm.errors import Overloaded


class Capacity:
    """Safe to use from any thread. num_used: requests that are running or waiting."""

    def __init__(self, limit: int) -> None:
        self.num_used = 0
        self._limit = limit
        self._lock = threading.Lock()

    def check(self, num_requests: int = 1) -> None:
        """Refuses further requests where the limit would be passed.

        Raises:
            Overloaded: it would.
        """
        if self.num_used + num_requests > self._limit:
            raise Overloaded(
                f"{self.num_used} requests are running or waiting, the limit is {self._limit}: try again later"
            )

    def acquire(self) -> None:
        """Counts one more; raises as `check`."""
        with self._lock:
            self.check()
            self.num_used += 1

    def release(self) -> None:
        with self._lock:
            self.num_used -= 1
