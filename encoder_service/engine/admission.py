"""Admission of items: bounded in patches, which bounds memory, and in seconds of work, which bounds waiting.

Pixels are decoded beside the tower, not in front of it: the queue is as long as the longer of the two.

An encoder whose CPU was short while it measured its tower takes its work for much more than it is. So while its cost
model is provisional, the tower's seconds refuse an item only once another one has really waited.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.types import ExpectedTime

# With a provisional cost model the tower's queue is short until an item has been in work for this long.
_SHORT_WAIT_S = 1.0


class Admission:
    """Counts the work of all items, from before their pixels are decoded until their rows have been shipped.

    An item that alone exceeds a bound is admitted when there is no other.

    Attributes:
        num_patches: patches of all items in work.
        uncorrected_s: how long the tower needs for these items by `cost`, without its correction: a better one counts
            for the items in work, too.
        preprocess_s: how long preprocessing needs for those whose patches are not there yet.

    Args:
        max_patches, max_s: bounds of the two.
        clock: seconds, that of deadlines.
    """

    def __init__(
        self, cost: CostModel, *, max_patches: int, max_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_patches = 0
        self.uncorrected_s = self.preprocess_s = 0.0
        # Since when each item has been in work, the first of them first.
        self.since: dict[Reservation, float] = {}
        self._cost = cost
        self._max_patches = max_patches
        self._max_s = max_s
        self.clock = clock

    @property
    def tower_s(self) -> float:
        """How long the tower needs for the items in work, by the cost model."""
        return self._cost.correction * self.uncorrected_s

    @property
    def seconds(self) -> float:
        """How long a new item waits."""
        return max(self.tower_s, self.preprocess_s)

    def expected(self, grid_thw: GridTHW, slowness: float) -> ExpectedTime:
        """How long an item would take that came now.

        Args:
            slowness: how many times as long as by the cost model the tower takes, see `Batcher.slowness`.
        """
        queue_s = max(slowness * self.tower_s, self.preprocess_s)
        return ExpectedTime(queue_s, slowness * self._cost.seconds(grid_thw))

    def admit(
        self, grid_thw: GridTHW, deadline: float = math.inf, *, preprocess_s: float = 0.0, reserve: bool = True
    ) -> Reservation:
        """An item's reservation, to be used as a context, at whose end it is released.

        Args:
            preprocess_s: how much longer preprocessing takes by this item.
            deadline: when the item's request ends, seconds of the monotonic clock.
            reserve: whether the context begins with it; otherwise `Reservation.reserve` is called when it has to be.

        Raises:
            Overloaded: see `check`.
        """
        uncorrected_s = self._cost.uncorrected_seconds(grid_thw)
        return Reservation(self, math.prod(grid_thw), uncorrected_s, preprocess_s, deadline, reserve)

    def check(self, num_patches: int, uncorrected_s: float, preprocess_s: float, deadline: float) -> None:
        """
        Raises:
            Overloaded: a bound would be exceeded, or the item could not be done in time.
        """
        if self.num_patches:
            self._check_patches(num_patches)
            correction = 0.0 if self._is_short else self._cost.correction
            queued_s = max(correction * self.uncorrected_s, self.preprocess_s)
            with_item_s = max(correction * (self.uncorrected_s + uncorrected_s), self.preprocess_s + preprocess_s)
            self._check_seconds(queued_s, with_item_s - queued_s, deadline)

    @property
    def _is_short(self) -> bool:
        """Whether the tower's queue is short whatever the cost model, which is provisional, takes it for."""
        return self._cost.is_provisional and self.clock() - next(iter(self.since.values())) < _SHORT_WAIT_S

    def _check_patches(self, num_patches: int) -> None:
        too_many = self.num_patches + num_patches - self._max_patches
        if too_many > 0:
            # The queue's seconds are about proportional to its patches.
            retry_after_s = self.seconds * min(1.0, too_many / self.num_patches)
            raise Overloaded(
                f"{self.num_patches} patches are queued and {num_patches} more would pass the limit of "
                f"{self._max_patches}: retry in {retry_after_s:.1f} s or add encoders",
                retry_after_s=retry_after_s,
            )

    def _check_seconds(self, queued_s: float, seconds: float, deadline: float) -> None:
        """
        Args:
            seconds: by which the queue becomes longer.
        """
        too_much_s = queued_s + seconds - self._max_s
        if too_much_s > 0:
            raise Overloaded(
                f"{queued_s:.1f} s of work are queued and {seconds:.2g} s more would pass the limit of "
                f"{self._max_s:g} s: retry in {too_much_s:.1f} s or add encoders",
                retry_after_s=too_much_s,
            )
        left_s = deadline - self.clock()
        if queued_s + seconds > left_s:
            raise Overloaded(
                f"{queued_s:.2g} s of work are queued and the item takes {seconds:.2g} s more, but its request "
                f"ends in {left_s:.2g} s: give it more time or add encoders",
                retry_after_s=queued_s,
            )


class Reservation:
    """One item's part of an admission, released at the end of its context."""

    def __init__(
        self,
        admission: Admission,
        num_patches: int,
        uncorrected_s: float,
        preprocess_s: float,
        deadline: float,
        reserves_at_once: bool,
    ) -> None:
        self._admission = admission
        self._num_patches, self._uncorrected_s, self._preprocess_s = num_patches, uncorrected_s, preprocess_s
        self._deadline = deadline
        self._reserves_at_once = reserves_at_once
        self._reserved = False

    def __enter__(self) -> Reservation:
        if self._reserves_at_once:
            self.reserve()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def reserve(self) -> None:
        """Adds the item's work to the admission; a second call changes nothing.

        Raises:
            Overloaded: see `Admission.check`.
        """
        if not self._reserved:
            admission = self._admission
            admission.check(self._num_patches, self._uncorrected_s, self._preprocess_s, self._deadline)
            admission.num_patches += self._num_patches
            admission.uncorrected_s += self._uncorrected_s
            admission.preprocess_s += self._preprocess_s
            admission.since[self] = admission.clock()
            self._reserved = True

    def end_preprocessing(self) -> None:
        """Takes the item's preprocessing out of the admission: its patches are there."""
        if self._reserved:
            admission = self._admission
            admission.preprocess_s = max(0.0, admission.preprocess_s - self._preprocess_s)
            self._preprocess_s = 0.0

    def release(self) -> None:
        """Takes the item's work out of the admission, if it is in it."""
        if self._reserved:
            self.end_preprocessing()
            self._reserved = False
            admission = self._admission
            del admission.since[self]
            admission.num_patches -= self._num_patches
            # Adding and subtracting floats leaves rounding errors.
            left_s = max(0.0, admission.uncorrected_s - self._uncorrected_s)
            admission.uncorrected_s = left_s if admission.num_patches else 0.0
            admission.preprocess_s = admission.preprocess_s if admission.num_patches else 0.0
