"""A process that measures or sends load, driven by lines on its stdin, so that it takes no CPU time of the caller."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_LINE_LIMIT_BYTES = 64 * 1024 * 1024


class LineProcess:
    """A running process. Create it with `started`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.pid = process.pid
        self._to, self._from = process.stdin, process.stdout

    @classmethod
    @asynccontextmanager
    async def started(cls, module: str, *arguments: str) -> AsyncIterator[LineProcess]:
        """Runs `python -m module` inside the context and terminates it at the end."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, stdin=pipe, stdout=pipe, limit=_LINE_LIMIT_BYTES
        )
        try:
            yield cls(process)
        finally:
            with suppress(ProcessLookupError):  # it has ended
                process.terminate()
            await process.wait()

    async def send_line(self, line: str) -> None:
        self._to.write(f"{line}\n".encode())
        await self._to.drain()

    async def read_line(self) -> str:
        """Returns the next line of its stdout, without the line break.

        Raises:
            RuntimeError: the process has ended.
        """
        if line := await self._from.readline():
            return line.decode().strip()
        raise RuntimeError("the process ended before it had printed its result: see its output above")
