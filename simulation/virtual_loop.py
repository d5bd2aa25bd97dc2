"""An event loop whose clock jumps from timer to timer: an hour of waiting takes as long as what happens in it.

Libraries that patch asyncio's own loop are not used: among equal times its heap has no order, so that two runs may
differ, and it has no way to say how long a thread's work takes. The order here is that of the calls. What is run in an
executor runs at once, and takes the virtual time that it says it takes (`block`).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, copy_context
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Args = TypeVarTuple("Args")

# Timers that were cancelled are removed once there are so many, and more than half of all.
_MAX_CANCELLED = 1000
# What a round of callbacks takes: waiting for less than a clock can resolve must end, as it does with a real clock.
_TICK_S = 1e-9


class NothingLeft(RuntimeError):
    """The main task waits for something that nothing will bring about."""


class _Handle:
    """A callback that is to run: what tasks and timeouts use of asyncio's own, which takes several times as long.

    loop: that of a timer which has not fired.
    """

    __slots__ = ("args", "callback", "context", "loop")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, loop: VirtualLoop | None = None
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args, self.context, self.loop = args, context, loop

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback, self.args = None, ()  # what they refer to is free at once
            if self.loop is not None:
                self.loop.count_cancelled_timer()

    def cancelled(self) -> bool:
        return self.callback is None


class VirtualLoop(asyncio.AbstractEventLoop):
    """
    num_callbacks: callbacks that have run.
    """

    def __init__(self) -> None:
        self.num_callbacks = 0
        self._now = 0.0
        self._job_s = 0.0  # how far the executor's job that runs just now is ahead
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._numbers = itertools.count()
        self._num_cancelled = 0
        self._errors: list[dict[str, Any]] = []
        self._running = False

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._now + self._job_s

    def block(self, seconds: float) -> None:
        """Lets so much virtual time pass. To be called by what runs in an executor, and by nothing else."""
        self._job_s += seconds

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end.

        Raises:
            NothingLeft: it waits, and no callback and no timer is left.
            RuntimeError: a callback, or a task that nothing awaits, has failed.
        """
        asyncio._set_running_loop(self)
        self._running = True
        try:
            task: asyncio.Task[T] = self.create_task(main)
            while not task.done():
                self._run_once()
                if self._errors:
                    raise RuntimeError(str(self._errors[0].get("message"))) from self._errors[0].get("exception")
            return task.result()
        finally:
            self._running = False
            asyncio._set_running_loop(None)

    def _run_once(self) -> None:
        if not self._ready:
            self._advance()
        self._now += _TICK_S
        ready, num_now = self._ready, len(self._ready)
        self.num_callbacks += num_now
        for _ in range(num_now):
            handle = ready.popleft()
            if handle.callback is not None:
                try:
                    handle.context.run(handle.callback, *handle.args)
                except Exception as error:
                    self.call_exception_handler({"message": f"{handle.callback} has failed", "exception": error})

    def _advance(self) -> None:
        """Moves the clock to the next timer, and makes all timers of that moment ready, in the order of their calls."""
        timers = self._timers
        while timers:
            when, _, handle = timers[0]
            if handle.callback is None:
                heapq.heappop(timers)
                self._num_cancelled -= 1
                continue
            if self._ready and when > self._now:
                return
            heapq.heappop(timers)
            handle.loop = None
            self._now = max(self._now, when)
            self._ready.append(handle)
        if not self._ready:
            raise NothingLeft(f"nothing is left to happen after {self._now:.3f} s, and the main task has not ended")

    # What asyncio's tasks, futures and timeouts use.

    def call_soon(
        self, callback: Callable[[Unpack[Args]], object], *args: *Args, context: Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, copy_context() if context is None else context)
        self._ready.append(handle)
        return handle  # type: ignore[return-value]

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Args]], object], *args: *Args, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)  # there is one thread

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + self._job_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = _Handle(callback, args, copy_context() if context is None else context, self)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle  # type: ignore[return-value]

    def count_cancelled_timer(self) -> None:
        """Counts a timer that was cancelled before it fired."""
        self._num_cancelled += 1
        if self._num_cancelled > max(_MAX_CANCELLED, len(self._timers) // 2):
            self._timers = [each for each in self._timers if not each[2].cancelled()]
            heapq.heapify(self._timers)
            self._num_cancelled = 0

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Args]], T], *args: *Args
    ) -> asyncio.Future[T]:
        """Runs `func` at once; its result is there after the time for which it blocks."""
        future = self.create_future()
        result: T | None = None
        error: Exception | None = None
        try:
            result = func(*args)
        except Exception as caught:
            error = caught
        took_s, self._job_s = self._job_s, 0.0
        if took_s:
            self.call_later(took_s, _set, future, result, error)
        else:
            _set(future, result, error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._errors.append(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return False


def new_virtual_loop() -> VirtualLoop:
    """A loop at second 0."""
    return VirtualLoop()  # type: ignore[abstract]  # sockets, signals and the like raise NotImplementedError


def _set(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
