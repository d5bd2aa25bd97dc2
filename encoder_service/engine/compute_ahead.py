"""Computes rows of tickets before they are claimed, so that a claim finds them in the embedding cache.

    add -> waits for a place -> computed -> claimed, or the ticket ends

The oldest tickets come first. A place is taken from the start of the computation until the claim or the end of the
ticket: where claims stay away, the tower computes no more than fill the places.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)

Compute: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


@dataclass
class AheadStats:
    """Tickets whose computation had begun when they were claimed, and when they ended without a claim."""

    claimed: int = 0
    unclaimed: int = 0


class ComputeAhead:
    """Belongs to one event loop.

    Args:
        max_unclaimed: places; 0 computes nothing ahead.
    """

    def __init__(self, max_unclaimed: int) -> None:
        self.stats = AheadStats()
        self._max_unclaimed = max_unclaimed
        self._waiting: dict[bytes, Compute] = {}
        self._started: dict[bytes, asyncio.Task[None]] = {}
        self._claimed: dict[bytes, asyncio.Task[None]] = {}
        self._supervisor: Supervisor | None = None

    def start(self, supervisor: Supervisor) -> None:
        """Begins to compute; the supervisor owns the computations."""
        self._supervisor = supervisor
        self._fill_places()

    async def close(self) -> None:
        """Stops all computations."""
        self._waiting.clear()
        if self._supervisor is not None:
            await self._supervisor.stop(*self._started.values(), *self._claimed.values())

    def add(self, ticket: bytes, compute: Compute) -> None:
        """Has the rows of a new ticket computed, once there is a place.

        Args:
            compute: computes them into the cache. Where it raises, the claim computes them, or fails.
        """
        if self._max_unclaimed:
            self._waiting[ticket] = compute
            self._fill_places()

    def claimed(self, ticket: bytes) -> None:
        """The claim computes the rows itself, or joins the computation, which goes on."""
        self._waiting.pop(ticket, None)
        task = self._started.pop(ticket, None)
        if task is not None:
            self._claimed[ticket] = task
            self.stats.claimed += 1
            self._fill_places()

    def ended(self, ticket: bytes) -> None:
        """Stops the computation, unless the ticket was claimed."""
        self._waiting.pop(ticket, None)
        task = self._started.pop(ticket, None)
        if task is not None:
            self.stats.unclaimed += 1
            self._cancel(task)
            self._fill_places()

    def abandoned(self, ticket: bytes) -> None:
        """Stops the computation of a claimed ticket that has ended, once all its claims have, too."""
        task = self._claimed.pop(ticket, None)
        if task is not None:
            self._cancel(task)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        assert self._supervisor is not None
        self._supervisor.expect_end(task)
        task.cancel()

    def _fill_places(self) -> None:
        while self._supervisor is not None and self._waiting and len(self._started) < self._max_unclaimed:
            ticket = next(iter(self._waiting))
            run = self._run(ticket, self._waiting.pop(ticket))
            self._started[ticket] = self._supervisor.start_job("rows ahead of their claim", run)

    async def _run(self, ticket: bytes, compute: Compute) -> None:
        try:
            await compute()
        except Exception as error:
            level = logging.DEBUG if isinstance(error, VitrineError) else logging.ERROR
            _log.log(level, "the rows of a ticket were not computed ahead of its claim: %r", error)
            if self._started.pop(ticket, None) is not None:  # it takes no place
                self._fill_places()
