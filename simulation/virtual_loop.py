"""An event loop whose clock jumps from timer to timer: an hour of waiting takes as long as what happens in it.

Libraries that patch asyncio's own loop are not used: its heap has no order among equal times, so that two runs may
differ. Here it is that of the calls; what is run in an executor runs at once, and takes as long as it says (`block`).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Cancelled timers are removed whenever there are twice as many timers as were left the last time, and so many.
_MIN_TIMERS = 1000
# What a round of callbacks takes: waiting for less than a clock can resolve must end, as it does with a real clock.
_TICK_S = 1e-9


class NothingLeft(RuntimeError):
    """The main task waits for something that nothing will bring about."""


class _Handle:
    """A callback that is to run: what tasks and timeouts use of asyncio's own, which takes several times as long."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args, self.context = args, copy_context() if context is None else context

    def cancel(self) -> None:
        self.callback, self.args = None, ()  # what they refer to is free at once


class VirtualLoop(asyncio.AbstractEventLoop):
    """num_callbacks: callbacks that have run."""

    def __init__(self) -> None:
        self.num_callbacks = 0
        self._now, self._job_s = 0.0, 0.0  # the latter: how far the executor's job that runs just now is ahead
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._numbers, self._max_timers = itertools.count(), _MIN_TIMERS
        self._errors: list[dict[str, Any]] = []
        # Without frames of Python, as `get_debug`, for which each future and task asks.
        self.create_future = partial(asyncio.Future, loop=self)  # type: ignore[method-assign]
        self.create_task = partial(asyncio.Task, loop=self)  # type: ignore[method-assign]

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._now + self._job_s

    def block(self, seconds: float) -> None:
        """Lets so much virtual time pass. To be called by what runs in an executor, and by nothing else."""
        self._job_s += seconds

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end. What it or a callback raises passes through.

        Raises:
            NothingLeft: it waits, and no callback and no timer is left.
            RuntimeError: a task that nothing awaits has failed.
        """
        asyncio._set_running_loop(self)
        try:
            task: asyncio.Task[T] = self.create_task(main)
            while not task.done():
                self._run_once()
                if self._errors:
                    raise RuntimeError(str(self._errors[0].get("message"))) from self._errors[0].get("exception")
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _run_once(self) -> None:
        """Where nothing is ready, moves the clock to the next timer; all timers of that moment fire in their order."""
        ready, timers = self._ready, self._timers
        if not ready:
            while timers and not (ready and timers[0][0] > self._now):
                when, _, handle = heapq.heappop(timers)
                if handle.callback is not None:
                    self._now = max(self._now, when)
                    ready.append(handle)
            if not ready:
                raise NothingLeft(f"nothing is left to happen after {self._now:.3f} s, and the main task has not ended")
        self._now += _TICK_S
        self.num_callbacks += len(ready)
        for _ in range(len(ready)):  # what these call comes in the next round
            handle = ready.popleft()
            if handle.callback is not None:
                handle.context.run(handle.callback, *handle.args)

    def call_soon(self, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None) -> Any:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is one thread
    get_debug = staticmethod(bool)  # False

    def call_later(self, delay: float, callback: Callable[[*Args], object], *args: *Args, context: Any = None) -> Any:
        return self.call_at(self._now + self._job_s + delay, callback, *args, context=context)

    def after(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done when so many seconds have passed: `asyncio.sleep` with half of its calls."""
        future: asyncio.Future[None] = self.create_future()
        self.call_later(seconds, lambda: None if future.done() else future.set_result(None))
        return future

    def call_at(self, when: float, callback: Callable[[*Args], object], *args: *Args, context: Any = None) -> Any:
        handle = _Handle(callback, args, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        if len(self._timers) > self._max_timers:
            self._timers = [each for each in self._timers if each[2].callback is not None]
            heapq.heapify(self._timers)
            self._max_timers = max(_MIN_TIMERS, 2 * len(self._timers))
        return handle

    def run_in_executor(self, executor: Any, func: Callable[[*Args], T], *args: *Args) -> asyncio.Future[T]:
        """Runs `func` at once; its result is there after the time for which it blocks."""
        future = self.create_future()
        settle: Callable[[Any], None] = future.set_result
        try:
            result: Any = func(*args)
        except Exception as error:
            settle, result = future.set_exception, error
        took_s, self._job_s = self._job_s, 0.0
        if took_s:
            self.call_later(took_s, lambda: None if future.cancelled() else settle(result))
        else:
            settle(result)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._errors.append(context)


def new_virtual_loop() -> VirtualLoop:
    """A loop at second 0."""
    return VirtualLoop()  # type: ignore[abstract]  # sockets, signals and the like raise NotImplementedError
