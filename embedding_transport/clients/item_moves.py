"""Which calls leave their encoder for another one: their rows would take far longer than others announce."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from vitrine_vlm.types import ExpectedTime, Layout

# So much longer than what was announced lately, and this many seconds more: below is what queues differ by anyway.
_FACTOR = 3.0
_SLACK_S = 0.1
# Announcements that are compared with, all encoders together. Of fewer than the least it is not known what is usual.
_NUM_COMPARED, _LEAST_COMPARED = 16, 4
# Of ten calls one may leave its encoder, and a few may at once: where all encoders are slow, another one is no better.
_BUDGET_PART, _BUDGET_MAX = 0.1, 5.0
# For so long an encoder that a call has left is passed over. One that is slow gets an item of each client in this time.
_PASSED_OVER_S = 5.0
# Of all encoders no larger part is passed over: the others have its work.
_PASSED_OVER_PART = 0.25


class ItemMoves:
    """What a client knows of how long its items take, and the budget for taking some to another encoder.

    num_moved: items that were taken to another encoder.
    """

    def __init__(self) -> None:
        self.num_moved = 0
        self._queue_s: deque[float] = deque(maxlen=_NUM_COMPARED)
        self._s_per_patch: deque[float] = deque(maxlen=_NUM_COMPARED)
        self._budget = _BUDGET_MAX
        self._passed_over: dict[str, float] = {}

    def add_call(self) -> None:
        """Counts a call, by which the budget grows."""
        self._budget = min(_BUDGET_MAX, self._budget + _BUDGET_PART)

    def is_long(self, layout: Layout, expected: ExpectedTime, in_flight: int) -> bool:
        """Whether an item's rows take far longer than usual; what is announced counts as usual from then on.

        Args:
            in_flight: the client's own items on the encoder, this one included: one waits for the others anywhere.
        """
        num_patches = math.prod(layout.grid_thw)
        is_long = False
        if len(self._queue_s) >= _LEAST_COMPARED:
            usual_s = _median(self._queue_s) + num_patches * _median(self._s_per_patch)
            limit_s = _FACTOR * max(1, in_flight) * usual_s + _SLACK_S
            is_long = expected.queue_s + expected.encode_s > limit_s
        self._queue_s.append(expected.queue_s)
        self._s_per_patch.append(expected.encode_s / num_patches)
        return is_long

    def passed_over(self, now: float) -> Collection[str]:
        """Addresses of the encoders that calls have left lately. now: seconds, of the clock of `move`."""
        if self._passed_over:
            self._passed_over = {address: until for address, until in self._passed_over.items() if now < until}
        return self._passed_over.keys()

    def move(self, address: str, num_items: int, num_encoders: int, now: float) -> bool:
        """Takes a call with so many items away from an encoder, if it may leave it.

        Args:
            num_encoders: those that can be used.
            now: seconds, monotonic.
        """
        passed_over = self.passed_over(now)
        if address not in passed_over and len(passed_over) >= max(1, int(_PASSED_OVER_PART * num_encoders)):
            return False
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        self._passed_over[address] = now + _PASSED_OVER_S
        self.num_moved += num_items
        return True


def _median(values: Collection[float]) -> float:
    return sorted(values)[len(values) // 2]
