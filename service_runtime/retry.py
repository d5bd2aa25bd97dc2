"""Which failures of a peer are retried on another peer, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from vitrine_vlm.service_runtime.backoff import Backoff

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 2.0

ErrorT = TypeVar("ErrorT", bound=Exception)


@dataclass(frozen=True)
class RetryPolicy(Generic[ErrorT]):
    """How a client retries a request.

    elsewhere: errors that are not caused by the request, so that another peer may serve it; all others end the request.
    budget_s: seconds in which failed peers are tried again, too, after growing pauses; 0: each peer is tried once.
    """

    elsewhere: tuple[type[ErrorT], ...]
    budget_s: float = 0.0


class RetryBudget:
    """Growing pauses between the attempts of one request, until `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._backoff = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)

    async def pause(self) -> bool:
        """Waits before the next attempt; returns False at once if the budget is spent."""
        if time.monotonic() >= self._deadline:
            return False
        await self._backoff.pause()
        return True


class Attempts(Generic[ErrorT]):
    """The failed attempts of one request so far.

    elsewhere: that of the RetryPolicy, for an `except`; failures: the last error of each peer, by address.
    """

    def __init__(self, policy: RetryPolicy[ErrorT]) -> None:
        self.elsewhere = policy.elsewhere
        self.failures: dict[str, ErrorT] = {}
        self._budget = RetryBudget(policy.budget_s)

    def failed(self, address: str, error: ErrorT) -> None:
        """Records that an error of `elsewhere` ended an attempt on this peer."""
        # The frames of a traceback refer to the request, which refers to this: only garbage collection frees a cycle.
        error.__cause__ = error.__context__ = None
        self.failures[address] = error.with_traceback(None)

    async def pause(self) -> bool:
        """Waits before the next attempt, see `RetryBudget.pause`."""
        return await self._budget.pause()
