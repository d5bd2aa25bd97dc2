"""A process that measures or loads, and is spoken to in lines: what it does takes no time from the one that asks."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_LINE_LIMIT_BYTES = 64 * 1024 * 1024


class LineProcess:
    """Make it with `started`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.pid = process.pid
        self._to, self._from = process.stdin, process.stdout

    @classmethod
    @asynccontextmanager
    async def started(cls, module: str, *arguments: str) -> AsyncIterator[LineProcess]:
        """`python -m module`, which should end with its stdin; it is ended behind the context."""
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

    async def say(self, line: str) -> None:
        self._to.write(f"{line}\n".encode())
        await self._to.drain()

    async def hear(self) -> str:
        """A line without its end.

        Raises:
            RuntimeError: it ended.
        """
        if line := await self._from.readline():
            return line.decode().strip()
        raise RuntimeError("a client ended before it had measured: see above")
