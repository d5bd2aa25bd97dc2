"""What a replica closes before Ray Serve ends its actor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine


class Closing(ABC):
    """A deployment that closes what it holds, once.

    Ray Serve calls `__del__` before it ends the actor, and awaits what that returns. The interpreter calls it again
    when it discards the object, and awaits nothing.
    """

    _is_closed = False

    @abstractmethod
    async def close(self) -> None:
        """Ends what the replica runs."""

    def __del__(self) -> Coroutine[object, object, None] | None:
        if self._is_closed:
            return None
        self._is_closed = True
        return self.close()
