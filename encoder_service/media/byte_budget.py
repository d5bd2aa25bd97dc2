"""How many bytes of encoded media are in memory, from their arrival until their items are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from vitrine_vlm.errors import Overloaded

# Called with a number of bytes that are about to be kept.
Reserve: TypeAlias = Callable[[int], None]


class ByteBudget:
    """Bounds the bytes of all items together. It belongs to one event loop.

    reserved_nbytes: bytes of all items now.
    """

    def __init__(self, max_nbytes: int) -> None:
        """
        Args:
            max_nbytes: bytes of all items at most; a single item may exceed it while there is no other.
        """
        self.reserved_nbytes = 0
        self._max_nbytes = max_nbytes

    @contextmanager
    def item(self) -> Iterator[Reserve]:
        """A function that reserves bytes for one item, on top of those it has; all are released at the end.

        Raises:
            Overloaded: raised by that function where the other items have reserved too much.
        """
        reserved = 0

        def reserve(nbytes: int) -> None:
            nonlocal reserved
            if self.reserved_nbytes > reserved and self.reserved_nbytes + nbytes > self._max_nbytes:
                raise Overloaded(
                    f"{self.reserved_nbytes} bytes of images and videos are in work and {nbytes} more would pass the "
                    f"limit of {self._max_nbytes}: retry later, add encoders or raise --max-held-media-bytes"
                )
            self.reserved_nbytes += nbytes
            reserved += nbytes

        try:
            yield reserve
        finally:
            self.reserved_nbytes -= reserved
