"""Admission of items: bounded in patches, which bounds memory, and in seconds of work, which bounds waiting.

Pixels are decoded beside the tower, not in front of it: the queue is as long as the longer of the two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.errors import Overloaded


class Admission:
    """Counts the work of all items, from before their pixels are decoded until their rows have been shipped.

    An item that alone exceeds a bound is admitted when there is no other.

    Attributes:
        num_patches: patches of all items in work.
        tower_s: how long the tower needs for these items, by `cost`.
        preprocess_s: how long preprocessing needs for those whose patches are not there yet.

    Args:
        max_patches, max_s: bounds of the two.
    """

    def __init__(self, cost: CostModel, *, max_patches: int, max_s: float) -> None:
        self.num_patches = 0
        self.tower_s = self.preprocess_s = 0.0
        self._cost = cost
        self._max_patches = max_patches
        self._max_s = max_s

    @property
    def seconds(self) -> float:
        """How long a new item waits."""
        return max(self.tower_s, self.preprocess_s)

    @contextmanager
    def admit(
        self, grid_thw: GridTHW, deadline: float = math.inf, *, preprocess_s: float = 0.0, reserve: bool = True
    ) -> Iterator[Reservation]:
        """An item's reservation, which is released at the end of the context.

        Args:
            preprocess_s: how much longer preprocessing takes by this item.
            deadline: when the item's request ends, seconds of the monotonic clock.
            reserve: whether to reserve at once; otherwise the caller calls `Reservation.reserve` when it has to.

        Raises:
            Overloaded: see `check`.
        """
        reservation = Reservation(self, math.prod(grid_thw), self._cost.seconds(grid_thw), preprocess_s, deadline)
        if reserve:
            reservation.reserve()
        try:
            yield reservation
        finally:
            reservation.release()

    def check(self, num_patches: int, tower_s: float, preprocess_s: float, deadline: float) -> None:
        """
        Raises:
            Overloaded: a bound would be exceeded, or the item could not be done in time.
        """
        if self.num_patches:
            seconds = max(self.tower_s + tower_s, self.preprocess_s + preprocess_s) - self.seconds
            self._check_capacity(num_patches, seconds)
            self._check_deadline(seconds, deadline)

    def _check_capacity(self, num_patches: int, seconds: float) -> None:
        """
        Args:
            seconds: by which the queue becomes longer.
        """
        too_many = self.num_patches + num_patches - self._max_patches
        if too_many > 0:
            # The queue's seconds are about proportional to its patches.
            retry_after_s = self.seconds * min(1.0, too_many / self.num_patches)
            raise Overloaded(
                f"{self.num_patches} patches are queued and {num_patches} more would pass the limit of "
                f"{self._max_patches}: retry in {retry_after_s:.1f} s or add encoders",
                retry_after_s=retry_after_s,
            )
        too_much_s = self.seconds + seconds - self._max_s
        if too_much_s > 0:
            raise Overloaded(
                f"{self.seconds:.1f} s of work are queued and {seconds:.2g} s more would pass the limit of "
                f"{self._max_s:g} s: retry in {too_much_s:.1f} s or add encoders",
                retry_after_s=too_much_s,
            )

    def _check_deadline(self, seconds: float, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if self.seconds + seconds > left_s:
            raise Overloaded(
                f"{self.seconds:.2g} s of work are queued and the item takes {seconds:.2g} s more, but its request "
                f"ends in {left_s:.2g} s: give it more time or add encoders",
                retry_after_s=self.seconds,
            )


class Reservation:
    """One item's part of an admission."""

    def __init__(
        self, admission: Admission, num_patches: int, tower_s: float, preprocess_s: float, deadline: float
    ) -> None:
        self._admission = admission
        self._num_patches, self._tower_s, self._preprocess_s = num_patches, tower_s, preprocess_s
        self._deadline = deadline
        self._reserved = False

    def reserve(self) -> None:
        """Adds the item's work to the admission; a second call changes nothing.

        Raises:
            Overloaded: see `Admission.check`.
        """
        if not self._reserved:
            admission = self._admission
            admission.check(self._num_patches, self._tower_s, self._preprocess_s, self._deadline)
            admission.num_patches += self._num_patches
            admission.tower_s += self._tower_s
            admission.preprocess_s += self._preprocess_s
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
            admission.num_patches -= self._num_patches
            # Adding and subtracting floats leaves rounding errors.
            admission.tower_s = max(0.0, admission.tower_s - self._tower_s) if admission.num_patches else 0.0
            admission.preprocess_s = admission.preprocess_s if admission.num_patches else 0.0
