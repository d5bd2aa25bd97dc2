"""All addresses of a DNS name, such as those of the pods behind a headless Service."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator

_log = logging.getLogger(__name__)
_INTERVAL_S = 5.0


class DnsSource:
    def __init__(self, name: str, port: str, interval_s: float = _INTERVAL_S) -> None:
        """Raises ValueError if the port is not a number."""
        if not port.isdecimal():
            raise ValueError(f"dns:{name}:{port}: the port must be a number")
        self._name, self._port, self._interval_s = name, int(port), interval_s

    async def watch(self) -> AsyncGenerator[list[str]]:
        while True:
            try:
                yield await self._look_up()
            except socket.gaierror as error:
                # The name of a Service without a ready pod does not resolve; nor does any name while DNS is down.
                _log.warning("%s has no address now: %s", self._name, error)
            await asyncio.sleep(self._interval_s)

    async def _look_up(self) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        hosts = sorted({str(sockaddr[0]) for *_, sockaddr in found})
        return [f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}" for host in hosts]
