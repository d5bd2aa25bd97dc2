"""Services in processes of their own, whose loops a test can break one by one.

Loops are known by the supervisor alone, from outside: its methods are wrapped before the service starts.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.integration.forked import CONTEXT, run_module
from vitrine_vlm.service_runtime.supervisor import Supervisor

_TIMEOUT_S = 60.0


class Injected(Exception):
    """What a broken loop raises."""


class InjectedInThread(BaseException):
    """The same in a thread: no `Exception`, as it comes in the middle of what threads handle the exceptions of."""


class BreakableService:
    """One service, as `python -m module flags...` would be, with its output in `log`."""

    def __init__(self, module: str, flags: list[str], log: Path) -> None:
        self.log = log
        self._connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_run, args=(module, flags, log, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_serving(self) -> dict[str, str]:
        """Its addresses by name, once it serves."""
        deadline = time.monotonic() + _TIMEOUT_S
        while " SERVING " not in (text := self.log.read_text() if self.log.exists() else ""):
            assert self.process.is_alive() and time.monotonic() < deadline, text
            time.sleep(0.05)
        return dict(re.findall(r"(\w+)=(\S+:\d+)", text))

    def names(self) -> list[str]:
        """Of all that its supervisor owns now."""
        self._connection.send("")
        return list(self._connection.recv())

    def break_loop(self, name: str) -> None:
        """Has it raise `Injected` at what it waits for just now."""
        self._connection.send(name)
        self.broken_at = time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()


class _Breakable:
    """Drives a coroutine as `await` would, and throws `Injected` into it where it waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._is_broken = False
        self._task: asyncio.Task[Any] | None = None

    def break_it(self) -> None:
        assert self._task is not None
        self._is_broken = True
        self._task.cancel()  # which ends what it waits for, too

    def __await__(self) -> Generator[Any, Any, None]:
        self._task = asyncio.current_task()
        step: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            try:
                waited_for = step(value)
            except StopIteration:
                return
            try:
                step, value = self._coroutine.send, (yield waited_for)
            except BaseException as error:
                step, value = self._coroutine.throw, error
                if self._is_broken and self._task is not None:
                    self._is_broken = False
                    self._task.uncancel()
                    value = Injected("by the test")


def _run(module: str, flags: list[str], log: Path, connection: Connection) -> None:
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    _wrap(connection)
    run_module(module, flags, fd)


def _wrap(connection: Connection) -> None:
    breaks: dict[str, Callable[[], object]] = {}
    init, start, start_thread = Supervisor.__init__, Supervisor._start, Supervisor.start_thread

    def wrapped_init(self: Supervisor) -> None:
        init(self)
        loop = asyncio.get_running_loop()
        threading.Thread(target=_obey, args=(connection, self, breaks, loop), daemon=True).start()

    def wrapped_start(self: Supervisor, entry: Any, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        breakable = _Breakable(coroutine)
        breaks[entry.name] = breakable.break_it

        async def run() -> None:
            await breakable

        return start(self, entry, run())

    def wrapped_start_thread(self: Supervisor, name: str, target: Callable[[], None]) -> threading.Thread:
        waited_for = getattr(target, "__self__", None)
        if isinstance(waited_for, threading.Thread):  # by `join`, in C, which no exception interrupts

            def target() -> None:
                while waited_for.is_alive():
                    waited_for.join(0.05)

        thread = start_thread(self, name, target)
        breaks[name] = lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(InjectedInThread)
        )
        return thread

    Supervisor.__init__ = wrapped_init  # type: ignore[method-assign]
    Supervisor._start = wrapped_start  # type: ignore[method-assign]
    Supervisor.start_thread = wrapped_start_thread  # type: ignore[method-assign]


def _obey(
    connection: Connection,
    supervisor: Supervisor,
    breaks: dict[str, Callable[[], object]],
    loop: asyncio.AbstractEventLoop,
) -> None:
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        if name:
            loop.call_soon_threadsafe(breaks[name])
        else:
            connection.send(supervisor.names())
