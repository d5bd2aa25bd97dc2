"""What every frontend does around a request: counts it, measures it, and has it end with the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager

from vitrine_vlm.llm_worker.generation.events import GenerationEvent, Observe
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.service_runtime.running_calls import RunningCalls


class Requests:
    """The requests of all ports of a worker.

    Args:
        calls: those in flight.
    """

    def __init__(self, metrics: LlmMetrics, calls: RunningCalls) -> None:
        self._metrics = metrics
        self._calls = calls

    @asynccontextmanager
    async def running(
        self, start: Callable[[Observe], AsyncGenerator[GenerationEvent]]
    ) -> AsyncGenerator[AsyncGenerator[GenerationEvent]]:
        """One request, and its events; leaving cancels it everywhere.

        Args:
            start: begins the request, which is to report each event to what it is given.

        Raises:
            WorkerUnavailable: the worker is ending, or has to in the middle of the request.
        """
        with self._metrics.watch() as observe, self._calls.track():
            async with aclosing(start(observe)) as events:
                yield events
