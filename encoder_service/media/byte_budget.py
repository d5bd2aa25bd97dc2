"""How many bytes of encoded media are in memory, from their arrival until their items are done."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

from vitrine_vlm.errors import Overloaded

# Called with a number of bytes that are about to be kept.
Reserve: TypeAlias = Callable[[int], None]


class ByteBudget:
    """Bounds the bytes of all items together. It belongs to one event loop.

    reserved_nbytes: bytes of all items now.
    """

    def __init__(
        self, max_nbytes: int, held: str = "images and videos", setting: str = "--max-held-media-bytes"
    ) -> None:
        """
        Args:
            max_nbytes: bytes of all items at most; a single item may exceed it while there is no other.
            held, setting: what the bytes are of and how to allow more, for errors.
        """
        self.reserved_nbytes = 0
        self._max_nbytes = max_nbytes
        self._held, self._setting = held, setting

    @property
    def left_nbytes(self) -> int:
        return max(0, self._max_nbytes - self.reserved_nbytes)

    def item(self) -> ReservedBytes:
        """The bytes of one item: none yet, and one user."""
        return ReservedBytes(self)

    def add(self, nbytes: int, to: int) -> None:
        """Reserves bytes for an item that has `to` bytes.

        Raises:
            Overloaded: the other items have reserved too much.
        """
        if self.reserved_nbytes > to and self.reserved_nbytes + nbytes > self._max_nbytes:
            raise Overloaded(
                f"{self.reserved_nbytes} bytes of {self._held} are in work and {nbytes} more would pass the "
                f"limit of {self._max_nbytes}: retry later, add encoders or raise {self._setting}"
            )
        self.reserved_nbytes += nbytes


class ReservedBytes:
    """The bytes of one item. A user releases them at the end of a `with`; they are free once all users have.

    nbytes: bytes reserved so far.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self.nbytes = 0
        self._budget = budget
        self._num_users = 1

    def reserve(self, nbytes: int) -> None:
        """Reserves bytes on top of those that the item has.

        Raises:
            Overloaded: see `ByteBudget.add`.
        """
        self._budget.add(nbytes, to=self.nbytes)
        self.nbytes += nbytes

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
            self._budget.reserved_nbytes -= self.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
