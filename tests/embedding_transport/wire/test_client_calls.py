"""Calls in flight of one address are limited on a gRPC port; those with a key are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from tests.embedding_transport.wire.test_message_bounds import connected, method
from vitrine_vlm.embedding_transport.wire.client_calls import ClientCalls
from vitrine_vlm.embedding_transport.wire.grpc_access import GrpcAccess
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.api_keys import ApiKey, ApiKeys, key_hash
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.key_metrics import KeyMetrics
from vitrine_vlm.service_runtime.port_limits import PortLimits

MAX_CALLS = 3


class Serving:
    """`/s/Wait` answers once the gate is open."""

    def __init__(self, access: Access) -> None:
        self.gate = asyncio.Event()
        bounds = MessageBounds(ByteBudget(1 << 20), PortLimits(client_timeout_s=5.0))
        interceptors = [GrpcAccess(access), ClientCalls(MAX_CALLS), bounds]
        self.server = ServiceServer(interceptors=interceptors)
        handlers: dict[str, Any] = {"Wait": grpc.unary_unary_rpc_method_handler(self._wait, bytes, bytes)}
        self.server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))

    async def _wait(self, request: bytes, context: Any) -> bytes:
        await self.gate.wait()
        return request


@pytest.fixture
async def serving(request: pytest.FixtureRequest) -> AsyncIterator[Serving]:
    serving = Serving(getattr(request, "param", Access()))
    serving.address = await serving.server.start("127.0.0.1", 0)  # type: ignore[attr-defined]
    yield serving
    serving.gate.set()
    await serving.server.stop(0)


async def refused(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_from_rpc(caught.value)
    assert isinstance(error, Overloaded) and error.retry_after_s >= 1 and "--max-client-connections" in str(error)


async def test_an_address_has_so_many_calls_over_all_its_connections(serving: Serving) -> None:
    async with connected(serving) as first, connected(serving) as second:
        calls = [asyncio.ensure_future(method(each.unary_unary, "Wait")(b"a")) for each in (first, second, first)]
        await asyncio.sleep(0.2)
        await refused(method(second.unary_unary, "Wait")(b"b"))
        reflection = reflection_pb2_grpc.ServerReflectionStub(first).ServerReflectionInfo()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.read()
        assert isinstance(error_from_rpc(caught.value), Overloaded), "streams of requests count, too"
        serving.gate.set()
        assert await asyncio.gather(*calls) == [b"a"] * 3
        assert await method(second.unary_unary, "Wait")(b"c") == b"c", "calls that have ended are not counted"


async def test_a_call_that_is_cancelled_is_not_counted(serving: Serving) -> None:
    async with connected(serving) as channel:
        for _ in range(3 * MAX_CALLS):
            call = method(channel.unary_unary, "Wait")(b"a")
            await asyncio.sleep(0.02)
            call.cancel()
        await asyncio.sleep(0.2)
        serving.gate.set()
        assert await method(channel.unary_unary, "Wait")(b"b") == b"b"


def of_one_key() -> Access:
    metrics = KeyMetrics(CollectorRegistry(), "vitrine_test")
    return Access(ApiKeys({key_hash("secret"): ApiKey("one")}, metrics))


@pytest.mark.parametrize("serving", [of_one_key()], indirect=True)
async def test_a_key_has_limits_of_its_own(serving: Serving) -> None:
    async with connected(serving) as channel:
        metadata = [("authorization", "Bearer secret")]
        calls = [method(channel.unary_unary, "Wait")(b"a", metadata=metadata) for _ in range(2 * MAX_CALLS)]
        await asyncio.sleep(0.2)
        serving.gate.set()
        assert await asyncio.gather(*calls) == [b"a"] * (2 * MAX_CALLS)
