"""How many bytes of requests, media and replies are in memory, from their arrival until they are released."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

from vitrine_vlm.errors import Overloaded

# Called with a number of bytes that are about to be kept.
Reserve: TypeAlias = Callable[[int], None]

# The last eighth of a budget is for small items: large ones, or what is sent slowly, do not keep them out.
_SMALL_NBYTES = 1024 * 1024
_PART_OF_LARGE = 7 / 8
# An item of a quarter of the budget or more says alone for how long bytes are kept; smaller ones count by their size.
_WEIGHT_OF_ALL = 4.0
_MAX_RETRY_AFTER_S = 60.0


class ByteBudget:
    """Bounds the bytes of all items together. It belongs to one event loop.

    reserved_nbytes: bytes of all items now.
    """

    def __init__(
        self,
        max_nbytes: int,
        held: str = "requests, media and replies",
        setting: str = "--max-held-bytes",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_nbytes: bytes of all items at most; a single item may exceed it while there is no other.
            held, setting: what the bytes are of and how to allow more, for errors.
            clock: returns monotonic seconds.
        """
        self.reserved_nbytes = 0
        self._max_nbytes = max_nbytes
        self._held, self._setting = held, setting
        self._clock = clock
        self._mean_hold_s = 0.0
        self._peak_nbytes = 0
        self._least_fall_nbytes: float = math.inf
        self._on_fall: Callable[[], None] = lambda: None

    def notify_falls(self, least_nbytes: int, on_fall: Callable[[], None]) -> None:
        """Has a function called each time that the bytes have fallen from a peak to half, and by `least_nbytes`."""
        self._least_fall_nbytes, self._on_fall = least_nbytes, on_fall

    @property
    def left_nbytes(self) -> int:
        return max(0, self._max_nbytes - self.reserved_nbytes)

    def item(self) -> ReservedBytes:
        """The bytes of one item: none yet, and one user."""
        return ReservedBytes(self, self._clock())

    def check(self, nbytes: int, to: int = 0) -> None:
        """
        Args:
            to: bytes that the item has already.

        Raises:
            Overloaded: the other items have reserved too much for an item with `nbytes` more.
        """
        limit = self._max_nbytes if to + nbytes <= _SMALL_NBYTES else int(self._max_nbytes * _PART_OF_LARGE)
        if self.reserved_nbytes > to and self.reserved_nbytes + nbytes > limit:
            retry_after_s = min(max(1.0, self._mean_hold_s), _MAX_RETRY_AFTER_S)
            raise Overloaded(
                f"{self.reserved_nbytes} bytes of {self._held} are in work and {nbytes} more would pass the limit of "
                f"{limit}: retry in {retry_after_s:.0f} s, add replicas or raise {self._setting}",
                retry_after_s=retry_after_s,
            )

    def add(self, nbytes: int, to: int) -> None:
        """Reserves bytes for an item that has `to` bytes.

        Raises:
            Overloaded: see `check`.
        """
        self.check(nbytes, to)
        self.reserved_nbytes += nbytes
        self._peak_nbytes = max(self._peak_nbytes, self.reserved_nbytes)

    def free(self, nbytes: int, reserved_at: float) -> None:
        """Releases all bytes of an item."""
        self.reserved_nbytes -= nbytes
        weight = min(1.0, _WEIGHT_OF_ALL * nbytes / self._max_nbytes)
        self._mean_hold_s += weight * (self._clock() - reserved_at - self._mean_hold_s)
        fall = self._peak_nbytes - self.reserved_nbytes
        if fall >= self._least_fall_nbytes and 2 * fall >= self._peak_nbytes:
            self._peak_nbytes = self.reserved_nbytes
            self._on_fall()


class ReservedBytes:
    """The bytes of one item. A user releases them at the end of a `with`; they are free once all users have.

    nbytes: bytes reserved so far. on_free: called once all users have released them.
    """

    def __init__(self, budget: ByteBudget, reserved_at: float) -> None:
        self.nbytes = 0
        self.on_free: Callable[[], None] = lambda: None
        self._budget = budget
        self._reserved_at = reserved_at
        self._num_users = 1

    def reserve(self, nbytes: int) -> None:
        """Reserves bytes on top of those that the item has.

        Raises:
            Overloaded: see `ByteBudget.check`.
        """
        self._budget.add(nbytes, to=self.nbytes)
        self.nbytes += nbytes

    def check(self, nbytes: int) -> None:
        """
        Raises:
            Overloaded: `reserve` would raise it now.
        """
        self._budget.check(nbytes, to=self.nbytes)

    @property
    def left_nbytes(self) -> int:
        """Bytes that the budget has left for all items."""
        return self._budget.left_nbytes

    def share(self) -> None:
        """Adds a user, who releases them, too."""
        self._num_users += 1

    def release(self) -> None:
        """Ends the use of one user."""
        self._num_users -= 1
        if not self._num_users:
            self._budget.free(self.nbytes, self._reserved_at)
            self.on_free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
