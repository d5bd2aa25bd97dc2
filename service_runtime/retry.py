"""Which failures of a peer send a request to another one, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from vitrine_vlm.service_runtime.backoff import Backoff

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 2.0

ErrorT = TypeVar("ErrorT", bound=Exception)


@dataclass(frozen=True)
class RetryPolicy(Generic[ErrorT]):
    """
    elsewhere: errors that are no fault of the request: another peer may serve it. All others end it.
    budget_s: how long a request also waits for peers that have failed it, with growing pauses; 0: each is tried once.
    """

    elsewhere: tuple[type[ErrorT], ...]
    budget_s: float = 0.0


class RetryBudget:
    """Pauses between the tries of one request, which grow, until `seconds` from now on are spent."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._backoff = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)

    async def pause(self) -> bool:
        """Waits before the next try; False at once if the budget is spent."""
        if time.monotonic() >= self._deadline:
            return False
        await self._backoff.pause()
        return True


class Attempts(Generic[ErrorT]):
    """The peers that one request has failed on so far.

    elsewhere: see RetryPolicy, for an `except`; failures: the last error of each peer, by address.
    """

    def __init__(self, policy: RetryPolicy[ErrorT]) -> None:
        self.elsewhere = policy.elsewhere
        self.failures: dict[str, ErrorT] = {}
        self._budget = RetryBudget(policy.budget_s)

    def failed(self, address: str, error: ErrorT) -> None:
        """One of `elsewhere` ended a try on this peer."""
        # The frames of a traceback hold the request, which holds this: a cycle that only a garbage collection frees.
        error.__cause__ = error.__context__ = None
        self.failures[address] = error.with_traceback(None)

    async def pause(self) -> bool:
        """Waits before the next try, see `RetryBudget.pause`."""
        return await self._budget.pause()
