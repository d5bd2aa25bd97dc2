"""A container's probes, with their periods and thresholds, as a kubelet runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc

from vitrine_vlm.service_runtime.health import health_status


@dataclass(frozen=True)
class Probe:
    """One rendered probe of a container.

    host: the pod's address. ports: numbers by name. period_s: as rendered, times what time is scaled by.
    """

    action: dict[str, Any]
    host: str
    ports: dict[str, int]
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int

    @classmethod
    def of(cls, rendered: dict[str, Any], host: str, ports: dict[str, int], time_scale: float) -> Probe:
        """
        Raises:
            ValueError: a kind of probe that is not known here.
        """
        known = {"httpGet", "grpc", "tcpSocket"}
        if not known & set(rendered):
            raise ValueError(f"probe {rendered}: only {', '.join(sorted(known))} are known here")
        return cls(
            action=rendered,
            host=host,
            ports=ports,
            period_s=rendered.get("periodSeconds", 10) * time_scale,
            timeout_s=rendered.get("timeoutSeconds", 1),
            success_threshold=rendered.get("successThreshold", 1),
            failure_threshold=rendered.get("failureThreshold", 3),
        )

    async def results(self) -> AsyncIterator[bool]:
        """Asks once a period; yields an answer whenever it came as many times in a row as its threshold says."""
        last, streak = None, 0
        while True:
            answer = await self._passes()
            streak = streak + 1 if answer is last else 1
            last = answer
            if streak == (self.success_threshold if answer else self.failure_threshold):
                yield answer
            await asyncio.sleep(self.period_s)

    async def _passes(self) -> bool:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._ask()
        except (OSError, TimeoutError, aiohttp.ClientError, grpc.aio.AioRpcError):
            return False

    async def _ask(self) -> bool:
        if asked := self.action.get("grpc"):
            status = await health_status(f"{self.host}:{asked['port']}", self.timeout_s, asked.get("service", ""))
            return status == "SERVING"
        if asked := self.action.get("httpGet"):
            scheme = asked.get("scheme", "HTTP").lower()
            url = f"{scheme}://{self.host}:{self._number(asked['port'])}{asked.get('path', '/')}"
            async with aiohttp.ClientSession() as session, session.get(url, ssl=False) as response:
                return 200 <= response.status < 400
        _, writer = await asyncio.open_connection(self.host, self._number(self.action["tcpSocket"]["port"]))
        writer.close()
        return True

    def _number(self, port: int | str) -> int:
        return port if isinstance(port, int) else self.ports[port]
