"""A server of a comparison while it runs: its processes, their logs, and how it ends."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from benchmarks.compare.server_file import ProcessSpec, ServerSpec, argv
from benchmarks.process_tree import cpu_seconds

_POLL_S = 0.25
_TAIL_LINES, _TAIL_BYTES = 20, 8192
_VERSION_TIMEOUT_S = 120.0
_KILL_AFTER_S = 10.0  # behind the grace of the processes, which their keeper looks after

T = TypeVar("T")


class ServerFailed(RuntimeError):
    """A process of the server ended by itself, or the server was not ready in time. `log_tail`: its last lines."""

    def __init__(self, message: str, log_tail: str) -> None:
        super().__init__(f"{message}\n{log_tail}")
        self.message = message
        self.log_tail = log_tail


@dataclass(frozen=True)
class _Process:
    name: str
    keeper: asyncio.subprocess.Process
    log: Path

    def tail(self) -> str:
        """Returns the last lines of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join([f"last lines of {self.log}:", *lines])


class RunningServer:
    """A server that was started. Create it with `started`.

    url: where it listens, without /v1.
    start_s: seconds from its start until it was ready; set by `wait_ready`.
    """

    def __init__(self, spec: ServerSpec, url: str, processes: Sequence[_Process]) -> None:
        self.url = url
        self.start_s = 0.0
        self._spec = spec
        self._processes = processes
        self._begin = time.monotonic()

    @classmethod
    @asynccontextmanager
    async def started(cls, spec: ServerSpec, port: str, logs: Path) -> AsyncIterator[RunningServer]:
        """Starts all processes inside the context, and ends them with all their descendants behind it.

        Args:
            spec: without placeholders.
            port: the HTTP port that is measured.
            logs: folder for a log of each process, which is kept.
        """
        processes: list[_Process] = []
        try:
            for each in spec.processes:
                processes.append(await _start(spec, each, logs))
            yield cls(spec, f"http://127.0.0.1:{port}", processes)
        finally:
            await asyncio.gather(*(_stop(each, spec.stop_grace_s + _KILL_AFTER_S) for each in processes))

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes and their descendants so far, seconds."""
        return sum(cpu_seconds(each.keeper.pid) for each in self._processes)

    async def wait_ready(self) -> None:
        """Waits until the server takes requests.

        Raises:
            ServerFailed: a process ended instead, or it took too long.
        """
        try:
            async with asyncio.timeout(self._spec.ready_timeout_s):
                await self.unless_failed(self._poll_ready())
        except TimeoutError as error:
            raise self._failed(f"{self._spec.name} is not ready after {self._spec.ready_timeout_s:g} s") from error
        self.start_s = time.monotonic() - self._begin

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns the result of `work`, which is cancelled as soon as a process ends.

        Raises:
            ServerFailed: names the process that ended.
        """
        task = asyncio.create_task(work)
        ends = {asyncio.create_task(each.keeper.wait()): each for each in self._processes}
        try:
            await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
            for end, process in ends.items():
                if end.done():
                    name = self._spec.name if len(ends) == 1 else f"{self._spec.name}'s {process.name}"
                    raise ServerFailed(f"{name} ended by itself with exit code {end.result()}", process.tail())
            return task.result()
        finally:
            for each in (task, *ends):
                each.cancel()
            await asyncio.gather(task, *ends, return_exceptions=True)

    def failure(self, error: Exception) -> ServerFailed:
        """Returns the error as one of the server, with the last lines of its logs."""
        return error if isinstance(error, ServerFailed) else self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, message: str) -> ServerFailed:
        return ServerFailed(message, "\n".join(each.tail() for each in self._processes))

    async def _poll_ready(self) -> None:
        waiting = [*self._spec.also_ready, f"{self.url}{self._spec.ready}"]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while waiting:
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(waiting[0]) as response:
                        if response.status == 200:
                            del waiting[0]
                            continue
                await asyncio.sleep(_POLL_S)


async def version_of(spec: ServerSpec) -> str | None:
    """Returns what the version command prints, or why it printed nothing; None without a command."""
    if spec.version is None:
        return None
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*argv(spec.version), stdout=pipe, stderr=pipe)
    except OSError as error:
        return f"unknown: {error}"
    try:
        async with asyncio.timeout(_VERSION_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"unknown: the version command took longer than {_VERSION_TIMEOUT_S:g} s"
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        return f"unknown: {lines[-1] if lines else f'exit code {process.returncode}'}"
    return output.decode(errors="replace").strip()


def shown_command(process: ProcessSpec) -> str:
    """Returns the command as a shell takes it, its own environment in front."""
    environment = [f"{name}={shlex.quote(value)}" for name, value in process.environment.items()]
    if isinstance(process.command, str) and not environment:
        return process.command
    # In front of a string of a shell's the variables would be those of its first command alone.
    return " ".join([*environment, shlex.join(argv(process.command))])


async def _start(spec: ServerSpec, process: ProcessSpec, logs: Path) -> _Process:
    log = logs / f"{spec.name}_{process.name}.log"
    keeper = [sys.executable, "-m", "benchmarks.compare.tree_keeper", str(os.getpid()), f"{spec.stop_grace_s:g}"]
    with log.open("ab") as file:
        started = await asyncio.create_subprocess_exec(
            *keeper,
            *_with_environment(process),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    return _Process(process.name, started, log)


def _with_environment(process: ProcessSpec) -> list[str]:
    # Set by env(1), because the keeper itself needs the environment of the comparison, for instance its PYTHONPATH.
    values = [f"{name}={value}" for name, value in process.environment.items()]
    return ["env", "PYTHONUNBUFFERED=1", *values, *argv(process.command)]


async def _stop(process: _Process, limit_s: float) -> None:
    with suppress(ProcessLookupError):  # it has ended
        process.keeper.terminate()
    try:
        async with asyncio.timeout(limit_s):
            await process.keeper.wait()
    except TimeoutError:
        print(f"{process.name} could not be ended within {limit_s:g} s: see {process.log}", file=sys.stderr, flush=True)
