"""Probes of a service: its health and its queued work."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp
import grpc
from prometheus_client.parser import text_string_to_metric_families

from vitrine_vlm.service_runtime.health import health_status

_TIMEOUT_S = 10.0


async def grpc_serving(address: str) -> bool:
    """Whether grpc.health.v1 answers SERVING; False without an answer."""
    try:
        return await health_status(address, _TIMEOUT_S) == "SERVING"
    except grpc.aio.AioRpcError:
        return False


async def http_ok(url: str) -> bool:
    """Whether the answer is 200; False without an answer."""
    timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def read_gauges(url: str, names: Sequence[str]) -> list[float]:
    """Returns the values of Prometheus metrics.

    Raises:
        aiohttp.ClientError, TimeoutError: the service does not answer.
        KeyError: the service lacks a metric.
    """
    timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session, session.get(url) as response:
        text = await response.text()
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    return [values[name] for name in names]
