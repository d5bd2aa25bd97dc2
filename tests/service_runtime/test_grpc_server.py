"""The end of a gRPC port."""

from __future__ import annotations

import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vitrine_vlm.service_runtime.grpc_server import ServiceServer


async def test_watches_of_the_health_service_do_not_delay_the_end_of_the_port() -> None:
    server = ServiceServer()
    address = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        begin = time.monotonic()
        await server.stop(10)
        assert time.monotonic() - begin < 5
        with pytest.raises(grpc.aio.AioRpcError, match="watch another one") as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
