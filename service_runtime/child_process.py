"""A service run as a child process: its output is prefixed with its name, and it ends with this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Not a `preexec_fn`: with one, Python forks instead of using vfork, and gRPC's handlers for fork() restart its
# threads in the child, which abort when their file descriptors are closed before the exec.
_BOUND_TO_PARENT = Path(__file__).with_name("bound_to_parent.py")
_LINE_LIMIT_BYTES = 1024 * 1024


class ChildFailed(RuntimeError):
    """A service ended without having been stopped, or was not ready in time."""


def bound_command(arguments: Sequence[str]) -> list[str]:
    """Returns the command for `python -P -m arguments...`, which gets SIGTERM when this process has ended."""
    # -P: packages are not imported from the working directory
    return _bound([sys.executable, "-P", "-m", *arguments])


def _bound(command: Sequence[str]) -> list[str]:
    # -IS: only the standard library is needed before the exec
    return [sys.executable, "-IS", str(_BOUND_TO_PARENT), str(os.getpid()), *command]


class Child:
    """One running service. Create it with `start`, and always call `stop`."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, write: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self._process = process
        self._write = write or self._write_named
        self._held: list[str] | None = None  # lines that are printed later
        # The owner of the child waits for the end of this task by `failed`.
        self._output = asyncio.create_task(self._print_output(), name=f"{name} output")

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        write: Callable[[str], None] | None = None,
    ) -> Child:
        """Starts `python -P -m arguments...` in this process group, with the same interpreter.

        Args:
            environment: variables to add to this process's environment.
            pass_fds: file descriptors that the child inherits under the same numbers.
            write: called with each line of the child's output; by default it is printed with the child's name.
        """
        environment = {"PYTHONUNBUFFERED": "1", **(environment or {})}
        return await cls._start(name, bound_command(arguments), environment, pass_fds, write)

    @classmethod
    async def start_program(
        cls, name: str, command: Sequence[str], environment: Mapping[str, str], write: Callable[[str], None]
    ) -> Child:
        """Starts another program, given by its full path and its arguments, like `start`.

        It has a session of its own, so that Ctrl-C in a terminal does not end it before services that need it.
        """
        return await cls._start(name, _bound(command), environment, (), write, own_session=True)

    @classmethod
    async def _start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        pass_fds: Sequence[int],
        write: Callable[[str], None] | None,
        *,
        own_session: bool = False,
    ) -> Child:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LINE_LIMIT_BYTES,
            pass_fds=pass_fds,
            env={**os.environ, **environment},
            start_new_session=own_session,  # and not a process group: uvloop, which Ray runs replicas on, has none
        )
        return cls(name, process, write)

    @contextmanager
    def output_held(self) -> Iterator[None]:
        """Prints what the service writes meanwhile at the end of the context: this process writes something else."""
        held: list[str] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
            for text in held:
                self._print(text)

    async def failed(self) -> ChildFailed:
        """Waits until the service ends by itself; returns the error that describes it."""
        await asyncio.shield(self._output)  # ends with the process
        code = await self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildFailed(f"{self.name} {how}: its last lines above say why")

    async def stop(self, grace_s: float) -> None:
        """Terminates the service, and kills it after `grace_s` seconds. Does nothing if it has ended."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                self._print(f"did not stop within {grace_s:g} s and is killed")
                self._process.kill()
                await self._process.wait()
        await asyncio.gather(self._output, return_exceptions=True)

    async def _print_output(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # longer than the limit, and discarded; unread output would block the service
                continue
            if not line:
                return
            self._print(line.decode(errors="replace").rstrip())

    def _print(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
            return
        # Where our own output is closed, or cannot encode the line, it is lost: that is no reason to end a service, nor
        # to leave off reading, which would bring it to a halt.
        with suppress(OSError, ValueError):
            self._write(text)

    def _write_named(self, text: str) -> None:
        print(_named(self.name, text), flush=True)


def _named(name: str, line: str) -> str:
    """A line of a child's with the child's name: in front of text, in JSON as a key, so that it still can be parsed."""
    if line.startswith('{"'):
        return f'{{"process": {json.dumps(name)}, {line[1:]}'
    return f"[{name}] {line}"
