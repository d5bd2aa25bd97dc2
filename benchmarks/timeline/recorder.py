"""Records what a process has its device compute, by events on a GPU and by the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timeline.span import Kind, Span

# Of so many the moment is taken that is known most exactly.
_NUM_TRIES = 20


@dataclass(frozen=True)
class _Launched:
    """What was launched; start and end are None on a CPU, where it has ended on return."""

    kind: Kind
    num_tokens: int
    launched_s: float
    returned_s: float
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None


@dataclass(frozen=True)
class _Moment:
    """An event, and when it happened by the host's clock."""

    event: torch.cuda.Event
    seconds: float


class Recorder:
    """Holds what was launched until `spans` is called. Threads may add to it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._launched: list[_Launched] = []
        self._device = torch.device("cpu")
        self._first: _Moment | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it has a GPU."""
        return self._first is not None

    def use(self, device: torch.device) -> None:
        """Sets the device, before the first event is recorded. It must be quiet."""
        self._device = device
        if device.type == "cuda":
            self._first = self._moment()

    def event(self) -> torch.cuda.Event | None:
        """Records an event on the current stream; None on a CPU."""
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(
        self,
        kind: Kind,
        num_tokens: int,
        launched_s: float,
        returned_s: float,
        start: torch.cuda.Event | None,
        end: torch.cuda.Event | None,
    ) -> None:
        """See `Span`; start, end: events around it, as from `event`."""
        self._launched.append(_Launched(kind, num_tokens, launched_s, returned_s, start, end))

    def spans(self) -> list[Span]:
        """All that was launched, which is waited for."""
        if self._first is None:
            return [self._span(each, each.launched_s, each.returned_s, "cpu") for each in self._launched]
        first, last = self._first, self._moment()
        # The clocks of host and GPU drift apart by milliseconds a minute.
        a_ms = (last.seconds - first.seconds) / first.event.elapsed_time(last.event)
        device = str(torch.cuda.get_device_properties(self._device).uuid)
        spans = []
        for each in self._launched:
            assert each.start is not None and each.end is not None
            begin_s, end_s = (first.seconds + a_ms * first.event.elapsed_time(at) for at in (each.start, each.end))
            spans.append(self._span(each, begin_s, end_s, device))
        return spans

    def _span(self, launched: _Launched, begin_s: float, end_s: float, device: str) -> Span:
        return Span(
            launched.kind, launched.num_tokens, launched.launched_s, launched.returned_s, begin_s, end_s, device
        )

    def _moment(self) -> _Moment:
        torch.cuda.synchronize(self._device)
        found: list[tuple[float, _Moment]] = []
        for _ in range(_NUM_TRIES):
            event, begin_s = torch.cuda.Event(enable_timing=True), self.clock()
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            end_s = self.clock()
            found.append((end_s - begin_s, _Moment(event, (begin_s + end_s) / 2)))
        return min(found, key=lambda each: each[0])[1]
