"""A pool of encoders as queues of work, for runs of an hour with hundreds of them: what is looked at is their number.

Items come as a Poisson process and are spread evenly; an encoder does a second of work a second, one item behind the
other, and refuses what would wait longer than admission allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vitrine_vlm.encoder_service.engine.tower_load import WINDOW_S
from vitrine_vlm.simulation.costs import MEASURED
from vitrine_vlm.simulation.encoder import EncoderLimits
from vitrine_vlm.simulation.workload import SIZES, Picture

STEP_S = 0.25


@dataclass
class Pool:
    """
    queue_s: seconds of work of each encoder that serves, the oldest first. starting_until: when the others will serve.
    num_items, num_refused: so far. waits: (seconds, items) of each step: how long those that came waited.
    """

    num_pods: int
    start_s: float
    rng: np.random.Generator
    max_queued_s: float = field(default_factory=lambda: EncoderLimits().max_queued_s)

    def __post_init__(self) -> None:
        cost = MEASURED.tower_cost()
        self.work_s = np.array([cost.uncorrected_seconds(Picture("", *size).grid_thw) for size in SIZES])
        weights = np.array(list(SIZES.values()), dtype=float)
        self._parts = weights / weights.sum()
        self.mean_work_s = float(self.work_s @ self._parts)
        self.queue_s: npt.NDArray[np.float64] = np.zeros(self.num_pods)
        # Of each encoder the mean of the last while, and how much of it that is not from before its start.
        self._busy: npt.NDArray[np.float64] = np.zeros(self.num_pods)
        self._weight: npt.NDArray[np.float64] = np.zeros(self.num_pods)
        self.starting_until: list[float] = []
        self.num_items = self.num_refused = 0
        self.waits: list[tuple[float, int]] = []

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """Of each encoder that serves, the part of about the last 30 s in which it has computed."""
        return self._busy / np.maximum(self._weight, 1e-9)

    def scale_to(self, number: int, now: float) -> None:
        """Starts pods, or ends the youngest: first those that start, then those that serve, which end their work."""
        change = number - self.num_pods
        self.num_pods = number
        if change > 0:
            self.starting_until += [now + self.start_s] * change
        elif change < 0:
            num_starting = min(-change, len(self.starting_until))
            self.starting_until = self.starting_until[: len(self.starting_until) - num_starting]
            left = len(self.queue_s) - (-change - num_starting)
            self.queue_s, self._busy, self._weight = self.queue_s[:left], self._busy[:left], self._weight[:left]

    def step(self, now: float, work_rate: float) -> None:
        """Passes STEP_S seconds. work_rate: seconds of work that come in a second, to all."""
        num_ready = sum(until <= now for until in self.starting_until)
        if num_ready:
            self.starting_until = [until for until in self.starting_until if until > now]
            new = np.zeros(num_ready)
            self.queue_s = np.concatenate([self.queue_s, new])
            self._busy, self._weight = np.concatenate([self._busy, new]), np.concatenate([self._weight, new])
        num_serving = len(self.queue_s)
        rate = work_rate / self.mean_work_s * STEP_S / num_serving
        items = self.rng.poisson(rate * self._parts, (num_serving, len(self._parts)))
        work_s = items @ self.work_s
        has_room = self.queue_s + work_s <= self.max_queued_s
        counts = items.sum(axis=1)
        self.num_items += int(counts.sum())
        self.num_refused += int(counts[~has_room].sum())
        accepted = int(counts[has_room].sum())
        if accepted:
            self.waits.append((float((self.queue_s * counts)[has_room].sum()) / accepted, accepted))
        else:
            self.waits.append((0.0, 0))
        total_s = self.queue_s + np.where(has_room, work_s, 0.0)
        busy = np.minimum(total_s, STEP_S) / STEP_S
        self.queue_s = total_s - busy * STEP_S
        self._busy += (busy - self._busy) * (STEP_S / WINDOW_S)
        self._weight += (1.0 - self._weight) * (STEP_S / WINDOW_S)
