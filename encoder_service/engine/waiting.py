"""Items that wait for the tower: in the order in which they are due, and which of them run next."""

from __future__ import annotations

import math
import time
from bisect import insort

from vitrine_vlm.encoder_service.engine.batch import Entry
from vitrine_vlm.encoder_service.engine.cost_model import CostModel


class Waiting:
    """Items run in the order in which they are due: that of arrival, unless a deadline is near.

    Args:
        max_batch_patches: a batch takes items up to this many patches; a larger item runs alone.
    """

    def __init__(self, cost: CostModel, max_batch_patches: int) -> None:
        self._cost = cost
        self._max_batch_patches = max_batch_patches
        self._entries: list[Entry] = []  # by when they are due

    @property
    def num_patches(self) -> int:
        return sum(len(entry.patches_PX) for entry in self._entries)

    @property
    def is_full(self) -> bool:
        """Whether no other would fit into the next batch."""
        return self.num_patches >= self._max_batch_patches

    def add(self, entry: Entry) -> None:
        insort(self._entries, entry, key=lambda each: each.due)

    def discard(self, entry: Entry) -> None:
        """Lets go of an entry, and of its patches, unless it is in a batch already."""
        if entry in self._entries:
            self._entries.remove(entry)

    def take(self) -> list[Entry]:
        """The next batch: entries as they are due, less cancelled ones, while they fit.

        None joins that would make the first one late.
        """
        taken: list[Entry] = []
        num_patches, slack_s = 0, math.inf
        while self._entries:
            entry = self._entries[0]
            if not entry.result.done():
                seconds = self._cost.seconds(entry.grid_thw)
                num_patches += len(entry.patches_PX)
                if taken and (num_patches > self._max_batch_patches or seconds > slack_s):
                    break
                slack_s = slack_s - seconds if taken else _slack_s(entry, seconds)
                taken.append(entry)
            self._entries.pop(0)
        return taken


def _slack_s(entry: Entry, seconds: float) -> float:
    """How much more than its own `seconds` of work may run with it; without limit if it is late anyway."""
    slack_s = entry.deadline - time.monotonic() - seconds
    return slack_s if slack_s > 0 else math.inf
