"""How long a request is tried again."""

from __future__ import annotations

import asyncio
import time

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 2.0


class Patience:
    """Pauses between attempts that grow, for `seconds` from now on."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause_s = _FIRST_PAUSE_S

    async def pause(self) -> bool:
        """Waits before the next attempt; False at once if there is no time for one."""
        if time.monotonic() > self._deadline:
            return False
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        return True
