"""How fast the tower is now: what is announced to clients follows one that becomes slow within a batch."""

from __future__ import annotations

import time
from collections.abc import Callable

# A batch that should take less counts as one that should take as long: a pause of the host makes no tower slow.
_LEAST_EXPECTED_S = 0.01
# An older batch says nothing about the tower of now. As nothing is announced then, the next item stays and measures it.
_KNOWN_FOR_S = 5.0


class TowerSpeed:
    """Compares the newest batch with the cost model, which follows only over tens of batches.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ratio = 1.0
        self._known_until = clock()

    def add(self, forward_s: float, expected_s: float) -> None:
        """Counts a batch that has just ended. forward_s: how long it took; expected_s: by the cost model."""
        self._ratio = forward_s / max(expected_s, _LEAST_EXPECTED_S)
        self._known_until = self._clock() + _KNOWN_FOR_S

    def slowness(self, front: tuple[float, float] | None) -> float | None:
        """How many times as long as by the cost model the tower takes, at least 1; None where that is not known.

        Args:
            front: seconds for which a batch has run, and that it should take; None where none runs.
        """
        is_known = self._clock() < self._known_until
        newest = max(1.0, self._ratio) if is_known else 1.0
        if front is None:
            return newest if is_known else None
        elapsed_s, expected_s = front
        return max(newest, elapsed_s / max(expected_s, _LEAST_EXPECTED_S))
