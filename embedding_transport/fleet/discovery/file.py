"""A text file with one address per line, read again every second. Empty lines and # comments are ignored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path

_log = logging.getLogger(__name__)
_INTERVAL_S = 1.0


class FileSource:
    def __init__(self, path: Path, interval_s: float = _INTERVAL_S) -> None:
        self._path, self._interval_s = path, interval_s

    async def watch(self) -> AsyncGenerator[list[str]]:
        while True:
            try:
                lines = [line.partition("#")[0].strip() for line in self._path.read_text().splitlines()]
                yield [line for line in lines if line]
            except (OSError, UnicodeError) as error:
                _log.warning("the list of encoders cannot be read: %s", error)
            await asyncio.sleep(self._interval_s)
