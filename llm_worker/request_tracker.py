"""Counts and measures requests, the same for every frontend, and ends them with the worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TypeAlias, TypeVar

from vitrine_vlm.llm_worker.generation.events import Finished, GenerationEvent, Observe, Started
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.service_runtime.access_log import report_more, report_slowest
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

            def observe_and_report(event: GenerationEvent, answer: int = 0) -> None:
                observe(event, answer)
                if isinstance(event, Started):
                    report_more(prompt_tokens=event.num_prompt_tokens, media_tokens=event.num_media_tokens)
                elif isinstance(event, Finished):
                    report_more(completion_tokens=event.num_completion_tokens, cached_tokens=event.num_cached_tokens)
                    report_slowest(vars(event.timings))

            async with aclosing(start(observe_and_report)) as events:
                yield events
