"""What becomes of items, counted between two reports to vLLM's metrics."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

# The counts of one report: values that vLLM sends from the scheduler's process to that of its API server.
Report = dict[str, Any]


class Outcome(StrEnum):
    """What becomes of an item.

    DELIVERED: its rows have landed in all workers.
    OWN_TOWER: Vitrine could not deliver it, vLLM's own tower encodes it.
    FAILED: Vitrine could not deliver it, and its request fails.
    CANCELLED: its request ended before.
    """

    DELIVERED = "delivered"
    OWN_TOWER = "own_tower"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StatsCollector:
    """Collects the counts of one scheduler.

    landed_nbytes: bytes of rows in each worker that have landed or are in flight.
    """

    def __init__(self) -> None:
        self.landed_nbytes = 0
        self._reported_nbytes = 0
        self._clear()

    def count(self, outcome: Outcome) -> None:
        self._items[outcome.value] = self._items.get(outcome.value, 0) + 1

    def landed(self, transport: str, nbytes: int, seconds: float) -> None:
        self.count(Outcome.DELIVERED)
        self._nbytes[transport] = self._nbytes.get(transport, 0) + nbytes
        self._seconds.append(seconds)

    def take_report(self) -> Report | None:
        """Returns what was counted since the last report; None if nothing has changed."""
        if not self._items and self.landed_nbytes == self._reported_nbytes:
            return None
        report = {
            "items": self._items,
            "nbytes": self._nbytes,
            "seconds": self._seconds,
            "landed_nbytes": self.landed_nbytes,
        }
        self._reported_nbytes = self.landed_nbytes
        self._clear()
        return report

    def _clear(self) -> None:
        self._items: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        self._seconds: list[float] = []


def merge_reports(earlier: Report, later: Report) -> Report:
    """Returns the counts of two reports of one scheduler, in the order in which they were made."""
    merged = {name: dict(earlier[name]) for name in ("items", "nbytes")}
    for name, counts in merged.items():
        for key, value in later[name].items():
            counts[key] = counts.get(key, 0) + value
    return merged | {
        "seconds": [*earlier["seconds"], *later["seconds"]],
        "landed_nbytes": later["landed_nbytes"],
    }
