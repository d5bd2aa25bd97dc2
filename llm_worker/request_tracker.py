"""Counts and measures requests, the same for every frontend, and ends them with the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TypeAlias, TypeVar

from vitrine_vlm.llm_worker.generation.events import Observe
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.service_runtime.running_calls import RunningCalls

EventT = TypeVar("EventT")
# The events of a request that begins with the context, and is cancelled at its end.
RunningRequest: TypeAlias = AbstractAsyncContextManager[AsyncGenerator[EventT]]


class RequestTracker:
    """Tracks the requests of all ports of a worker.

    Args:
        calls: the worker's requests in flight; ending them ends the requests.
    """

    def __init__(self, metrics: LlmMetrics, calls: RunningCalls) -> None:
        self._metrics = metrics
        self._calls = calls

    @asynccontextmanager
    async def track(self, start: Callable[[Observe], AsyncGenerator[EventT]]) -> AsyncGenerator[AsyncGenerator[EventT]]:
        """Begins one request and yields its events. Leaving the context cancels it everywhere.

        Args:
            start: begins the request; its argument is to be called with each event.

        Raises:
            WorkerUnavailable: the worker is ending, or ends in the middle of the request.
        """
        with self._metrics.measure_request() as observe, self._calls.track():
            async with aclosing(start(observe)) as events:
                yield events
