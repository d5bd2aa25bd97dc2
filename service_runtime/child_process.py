"""A service run as a child process: its output prefixed with its name, its life bound to ours."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Not a `preexec_fn`: with one, Python forks instead of using vfork, and gRPC's handlers for fork() restart its
# threads in the child, which abort when their file descriptors are closed before the exec.
_BOUND_TO_PARENT = Path(__file__).with_name("bound_to_parent.py")
_LINE_LIMIT_BYTES = 1024 * 1024


class ChildFailed(RuntimeError):
    """A service ended although nobody asked it to, or did not get ready in time."""


class Child:
    """One running service. Make it with `start`; always `stop` it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        # Its end is seen by `failed`, which the owner of a child waits for.
        self._output = asyncio.create_task(self._print_output(), name=f"{name} output")

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Child:
        """Starts `python -P -m arguments...` in our process group, with the interpreter we run in.

        Args:
            environment: added to ours.
            pass_fds: file descriptors that it gets under the same numbers.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-IS",  # only the standard library is needed until it becomes the service
            str(_BOUND_TO_PARENT),
            str(os.getpid()),
            sys.executable,
            "-P",  # folders of the working directory named as our packages or others are not imported
            "-m",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LINE_LIMIT_BYTES,
            pass_fds=pass_fds,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
        )
        return cls(name, process)

    async def failed(self) -> ChildFailed:
        """Waits until the service ends by itself and says so.

        Raises:
            OSError: its output cannot be passed on, as ours is closed.
        """
        await asyncio.shield(self._output)  # which ends with the process
        code = await self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildFailed(f"{self.name} {how}: its last lines above say why")

    async def stop(self, grace_s: float) -> None:
        """Asks the service to end, and after `grace_s` seconds ends it. Does nothing if it has ended."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                print(f"[{self.name}] did not stop within {grace_s:g} s and is killed", flush=True)
                self._process.kill()
                await self._process.wait()
        # Where our own output was closed it failed, which must not keep the other services from being stopped.
        await asyncio.gather(self._output, return_exceptions=True)

    async def _print_output(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # longer than the limit, and dropped; unread output would bring the service to a halt
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            print(f"[{self.name}] {text}", flush=True)
