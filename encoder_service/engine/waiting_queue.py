"""Items that wait for the tower, in the order in which they are due, and which of them run next."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable

from vitrine_vlm.encoder_service.engine.batch import QueuedItem
from vitrine_vlm.encoder_service.engine.cost_model import CostModel


class WaitingQueue:
    """Items run in the order in which they are due: that of arrival, unless a deadline is near.

    num_patches: of all items in the queue.

    Args:
        max_batch_patches: patches in a batch at most; a larger item runs alone.
        clock: seconds, that of deadlines.
    """

    def __init__(self, cost: CostModel, max_batch_patches: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._cost = cost
        self._max_batch_patches = max_batch_patches
        self._clock = clock
        self.num_patches = 0
        self._items: list[QueuedItem] = []  # sorted by when they are due
        self._present: set[QueuedItem] = set()  # the same: most items that are discarded have left it

    @property
    def is_full(self) -> bool:
        """Whether no other item would fit into the next batch."""
        return self.num_patches >= self._max_batch_patches

    def add(self, item: QueuedItem) -> None:
        insort(self._items, item, key=lambda each: each.due)
        self._present.add(item)
        self.num_patches += item.num_patches

    def discard(self, item: QueuedItem) -> None:
        """Removes an item, and so releases its patches, unless it is in a batch already."""
        if item in self._present:
            self._items.remove(item)
            self._left(item)

    def pop_batch(self) -> list[QueuedItem]:
        """Removes and returns the items of the next batch: as they are due, without cancelled ones, while they fit.

        An item that would make the first one late does not join.
        """
        popped: list[QueuedItem] = []
        num_patches, slack_s = 0, math.inf
        while self._items:
            item = self._items[0]
            if not item.result.done():
                seconds = self._cost.seconds(item.grid_thw)
                num_patches += item.num_patches
                if popped and (num_patches > self._max_batch_patches or seconds > slack_s):
                    break
                slack_s = slack_s - seconds if popped else self._slack_s(item, seconds)
                popped.append(item)
            self._left(self._items.pop(0))
        return popped

    def _left(self, item: QueuedItem) -> None:
        self._present.remove(item)
        self.num_patches -= item.num_patches

    def _slack_s(self, item: QueuedItem, seconds: float) -> float:
        """How much work besides the item's own `seconds` its batch may do; without limit if it is late anyway."""
        slack_s = item.deadline - self._clock() - seconds
        return slack_s if slack_s > 0 else math.inf
