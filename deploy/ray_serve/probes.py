"""What a service says of itself: whether it is healthy, and how much it has to do."""

from __future__ import annotations

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from service_runtime.grpc_channel import open_channel

_TIMEOUT_S = 10.0


async def grpc_serving(address: str) -> bool:
    """Whether grpc.health.v1 says SERVING; False where nothing answers."""
    async with open_channel(address) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def http_ok(url: str) -> bool:
    """Whether the answer is 200; False where nothing answers."""
    timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def read_gauge(url: str, name: str) -> float:
    """The value of a Prometheus metric.

    Raises:
        aiohttp.ClientError, TimeoutError: nothing answers.
        KeyError: there is no such metric.
    """
    timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session, session.get(url) as response:
        text = await response.text()
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    return values[name]
