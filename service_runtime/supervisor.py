"""Owns the background work of a process, and notices when a part of it ends without having been stopped.

All that runs longer than one request has its owner here: tasks that loop, raw threads, child processes. A supervisor
restarts nothing. It logs the name and the traceback of what ended, and the first such end is its `failure`: a service
ends with it (`lifecycle.py`); a client outside of a service fails its calls.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from vitrine_vlm.service_runtime.cancellation import running_until
from vitrine_vlm.service_runtime.child_process import Child

_log = logging.getLogger(__name__)

T = TypeVar("T")
Owned: TypeAlias = "asyncio.Task[None] | threading.Thread"


class ServiceFailed(RuntimeError):
    """A part that a service cannot do without has ended by itself; its traceback is in the log."""


@dataclass(frozen=True)
class Failure:
    """An unexpected end of background work.

    name: the name of the task, thread or process.
    error: the exception that it raised; None if it returned.
    can_unwind: False if cleaning up would block or do harm; then the process ends without.
    """

    name: str
    error: BaseException | None
    can_unwind: bool = True

    def __str__(self) -> str:
        return f"{self.name} ended" + (f" with {type(self.error).__name__}" if self.error is not None else "")


@dataclass(frozen=True)
class _Entry:
    name: str
    may_return: bool = False
    can_unwind: bool = True


class Supervisor:
    """The owner of background work. It belongs to one event loop.

    failure: the first unexpected end, once there is one.
    """

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self._entries: dict[Owned, _Entry] = {}
        self._callbacks: list[Callable[[Failure], None]] = []
        self._failed = asyncio.Event()

    def start_task(self, name: str, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a loop, which ends only by `stop` or `close`: if it returns, that is a failure, too."""
        return self._start(_Entry(name), coroutine)

    def start_job(self, name: str, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs work that ends by itself; if it raises, that is a failure."""
        return self._start(_Entry(name, may_return=True), coroutine)

    def start_thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Runs a daemon thread. Call `expect_end` before you make it end."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            error: BaseException | None = None
            try:
                target()
            except BaseException as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed, and the service with it
                loop.call_soon_threadsafe(self._ended, thread, name, error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._entries[thread] = _Entry(name)
        thread.start()
        return thread

    def watch_child(self, child: Child, *, can_unwind: bool = True) -> asyncio.Task[None]:
        """Owns a running child process until the returned task is stopped. Stop that task before the child.

        Args:
            can_unwind: see `Failure`.
        """

        async def fail_with_child() -> None:
            raise await child.failed()

        return self._start(_Entry(child.name, can_unwind=can_unwind), fail_with_child())

    def names(self) -> list[str]:
        """Returns the names of all background work, in the order of its start."""
        return [entry.name for entry in list(self._entries.values())]

    def expect_end(self, owned: Owned) -> None:
        """Marks the end of this task or thread as expected."""
        self._entries.pop(owned, None)

    async def stop(self, *tasks: asyncio.Task[None]) -> None:
        """Cancels tasks and waits for their end."""
        for task in tasks:
            self.expect_end(task)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stops all remaining tasks, the last one first; threads and child processes are not ended."""
        owned = list(self._entries)
        self._entries.clear()
        for each in reversed(owned):
            if isinstance(each, asyncio.Task):
                await self.stop(each)

    def fail(self, name: str, error: BaseException | None, *, can_unwind: bool = True) -> None:
        """Records a failure; also for what this supervisor does not own, such as a GPU."""
        failure = Failure(name, error, can_unwind)
        _log.error("%s unexpectedly: %s", failure, error or "it returned", exc_info=error)
        if self.failure is not None:
            return
        self.failure = failure
        self._failed.set()
        for callback in self._callbacks:
            try:
                callback(failure)
            except Exception:
                _log.exception("a callback for failures has failed")

    def on_failure(self, callback: Callable[[Failure], None]) -> None:
        """Calls `callback` with the failure, on the event loop; at once if there is a failure already."""
        self._callbacks.append(callback)
        if self.failure is not None:
            callback(self.failure)

    def check(self) -> None:
        """Raises an error if there is a failure.

        Raises:
            Exception: the exception of the failed work.
            ServiceFailed: the work returned or was cancelled.
        """
        if self.failure is None:
            return
        if isinstance(self.failure.error, Exception):
            raise self.failure.error
        raise ServiceFailed(str(self.failure)) from self.failure.error

    async def failed(self) -> Failure:
        """Waits for the failure."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    async def unless_failed(self, work: Awaitable[T]) -> T:
        """Returns the result of `work`, which is cancelled as soon as there is a failure.

        Raises:
            Exception: see `check`; a failure takes precedence over an error of `work`, which it may have caused.
        """
        async with running_until(self._failed, work) as working:
            self.check()
            return await working

    def _start(self, entry: _Entry, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=entry.name)
        self._entries[task] = entry
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._ended(task, task.get_name(), task.exception())
        elif task in self._entries:
            self._ended(task, task.get_name(), asyncio.CancelledError("cancelled by something else than its owner"))

    def _ended(self, owned: Owned, name: str, error: BaseException | None) -> None:
        entry = self._entries.pop(owned, None)
        if entry is not None and not (entry.may_return and error is None):
            self.fail(name, error, can_unwind=entry.can_unwind)
        elif error is not None:
            _log.error("%s failed while it was stopped", name, exc_info=error)
