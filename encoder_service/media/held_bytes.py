"""How many bytes of encoded media are in memory, from their arrival until their items are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from vitrine_vlm.errors import Overloaded

# Called with a number of bytes that are about to be kept.
Hold: TypeAlias = Callable[[int], None]


class HeldBytes:
    """nbytes: of all items now. Belongs to one event loop."""

    def __init__(self, max_nbytes: int) -> None:
        """
        Args:
            max_nbytes: of all items; one that alone has more is taken when nothing else is held.
        """
        self.nbytes = 0
        self._max_nbytes = max_nbytes

    @contextmanager
    def item(self) -> Iterator[Hold]:
        """What an item holds, which ends with it. Each call adds to it.

        Raises:
            Overloaded: by the call, where the others hold too much.
        """
        held = 0

        def hold(nbytes: int) -> None:
            nonlocal held
            if self.nbytes > held and self.nbytes + nbytes > self._max_nbytes:
                raise Overloaded(
                    f"{self.nbytes} bytes of images and videos are in work and {nbytes} more would pass the limit of "
                    f"{self._max_nbytes}: retry later, add encoders or raise --max-held-media-bytes"
                )
            self.nbytes += nbytes
            held += nbytes

        try:
            yield hold
        finally:
            self.nbytes -= held
