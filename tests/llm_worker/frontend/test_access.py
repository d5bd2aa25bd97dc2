"""Every route and every gRPC service is either open on purpose or needs a key; limits over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
from aiohttp.test_utils import TestClient, TestServer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from tests.llm_worker.frontend.http_client import body, client_of
from tests.llm_worker.frontend.serving import LocalWorker
from tests.service_runtime.test_api_keys import ALICE, BOB, bearer
from vitrine_vlm.embedding_transport.wire.grpc_access import OPEN_SERVICES
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY, RETRY_KEY
from vitrine_vlm.llm_worker.dashboard.routes import Dashboard
from vitrine_vlm.llm_worker.frontend.grpc_server import SERVICE, LlmServer, LlmServicer
from vitrine_vlm.llm_worker.frontend.openai_http import OpenAiHttp
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.api_keys import ApiKey, ApiKeys, key_hash
from vitrine_vlm.service_runtime.http_access import OPEN_PATHS
from vitrine_vlm.service_runtime.key_metrics import KeyMetrics
from vitrine_vlm.service_runtime.running_calls import RunningCalls

CHAT = "/v1/chat/completions"
HEALTH = "grpc.health.v1.Health"


def access(**limits: Any) -> Access:
    """Of two keys, the first with limits."""
    keys = {key_hash(ALICE): ApiKey("alice", **limits), key_hash(BOB): ApiKey("bob")}
    return Access(ApiKeys(keys, KeyMetrics(CollectorRegistry(), "vitrine_test")))


async def test_every_route_is_a_probe_or_needs_a_key() -> None:
    metrics = LlmMetrics()
    requests = RequestTracker(metrics, RunningCalls())
    http = OpenAiHttp(metrics, lambda: (False, {}), requests, frozenset(), True, access())
    application = http.application()
    Dashboard(lambda: (False, {})).add_routes(application)
    routes = [(each.method, each.resource.canonical) for each in application.router.routes() if each.resource]
    opened: set[str] = set()
    async with TestClient(TestServer(application)) as client:
        for method, path in [*routes, ("GET", "/unknown"), ("POST", "/v1/unknown"), ("GET", "/health/")]:
            response = await client.request(method, path.replace("{", "").replace("}", ""))
            if response.status != 401:
                opened.add(path)
                continue
            assert response.headers["WWW-Authenticate"] == "Bearer"
            if method != "HEAD":
                assert (await response.json())["error"]["code"] == "invalid_api_key"
    assert opened == OPEN_PATHS == {"/health", "/ready", "/ping"}
    assert len(routes) > 20


async def test_a_preflight_needs_no_key_and_errors_reach_the_page() -> None:
    page = {"Origin": "https://app.example"}
    async with client_of(None, frozenset(page.values()), access=access()) as client:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert (await client.options(CHAT, headers=page | asked)).status == 204
        refused = await client.post(CHAT, headers=page)
        assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, page["Origin"])


async def test_the_official_client_with_and_without_a_key(worker: LocalWorker) -> None:
    async with client_of(worker.served, access=access()) as client:
        for key, wanted in ((ALICE, None), ("wrong", openai.AuthenticationError)):
            url = str(client.make_url("/v1"))
            async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as official:
                if wanted is None:
                    answer = await official.chat.completions.create(**body(worker))
                    assert answer.choices[0].message.content is not None
                    continue
                with pytest.raises(wanted) as caught:
                    await official.chat.completions.create(**body(worker))
                assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
                assert "wrong" not in str(caught.value)


async def test_a_stream_is_in_flight_to_its_end(worker: LocalWorker) -> None:
    async with client_of(worker.served, access=access(max_in_flight=1)) as client:
        endless = body(worker, stream=True, max_tokens=400, ignore_eos=True)
        async with client.post(CHAT, json=endless, headers=bearer(ALICE)) as stream:
            await stream.content.readline()
            refused = await client.post(CHAT, json=body(worker), headers=bearer(ALICE))
            assert (refused.status, (await refused.json())["error"]["code"]) == (429, "rate_limit_exceeded")
            assert (await client.post(CHAT, json=body(worker), headers=bearer(BOB))).status == 200
            stream.close()
        async with asyncio.timeout(10):
            while (await client.post(CHAT, json=body(worker), headers=bearer(ALICE))).status == 429:
                await asyncio.sleep(0.02)


async def test_limits_a_minute_have_a_true_retry_after(worker: LocalWorker) -> None:
    picture = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"x" * 900).decode()},
    }
    media = body(worker, messages=[{"role": "user", "content": [picture]}])
    limits = access(requests_per_minute=4, media_bytes_per_minute=1000)
    async with client_of(worker.served, access=limits) as client:
        first = await client.post(CHAT, json=media, headers=bearer(ALICE))
        assert first.status == 503, "no encoder is there"
        for stream in (False, True):
            refused = await client.post(CHAT, json=media | {"stream": stream}, headers=bearer(ALICE))
            error = (await refused.json())["error"]
            assert (refused.status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
            assert refused.headers["Retry-After"] == "48", "800 of 1000 bytes a minute are missing"
        assert (await client.get("/v1/models", headers=bearer(ALICE))).status == 200
        refused = await client.get("/v1/models", headers=bearer(ALICE))
        assert (refused.status, refused.headers["Retry-After"]) == (429, "15")
        assert (await client.get("/health", headers=bearer(ALICE))).status == 200


@pytest.fixture
async def grpc_worker(worker: LocalWorker) -> AsyncIterator[str]:
    """Its address; Alice may have one call in flight."""
    servicer = LlmServicer(RequestTracker(LlmMetrics(), RunningCalls()))
    server = LlmServer(servicer, access=access(max_in_flight=1))
    address = await server.start("127.0.0.1", 0)
    servicer.open(worker.served)
    try:
        yield address
    finally:
        await server.stop(0)


def raw(channel: grpc.aio.Channel, service: str, method: str) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
    """A method of any kind: gRPC's wire does not know kinds."""
    return channel.stream_stream(f"/{service}/{method}")


async def test_every_service_is_health_or_needs_a_key(grpc_worker: str) -> None:
    async with grpc.aio.insecure_channel(grpc_worker) as channel:
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([listing]), metadata=tuple(bearer(ALICE).items())
        )
        (answer,) = [each async for each in reflected]
        services = {each.name for each in answer.list_services_response.service}
        assert {SERVICE, HEALTH} < services
        opened = set()
        # The unknown are refused like all else: their names are not listed without a key.
        for service in {*services, "vitrine.llm.v1.Unknown"}:
            for method in ("Generate", "Prefill", "Check", "ServerReflectionInfo", "Unknown"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in raw(channel, service, method)(timeout=1):
                        raise AssertionError
                if caught.value.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    opened.add(service)
                    continue
                assert dict(caught.value.trailing_metadata() or ())[ERROR_CODE_KEY] == "invalid_api_key"
    assert opened == OPEN_SERVICES == {HEALTH}


async def test_a_call_is_in_flight_to_its_end(grpc_worker: str) -> None:
    sampling = llm_pb2.SamplingParams(max_tokens=400, ignore_eos=True)
    request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling)
    alice, bob = (tuple(bearer(key).items()) for key in (ALICE, BOB))
    async with grpc.aio.insecure_channel(grpc_worker) as channel:
        stub = llm_pb2_grpc.LlmStub(channel)
        running = stub.Generate(request, metadata=alice)
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Prefill(llm_pb2.PrefillRequest(prompt=request.prompt), metadata=alice)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata() or ())
        assert trailers[ERROR_CODE_KEY] == "rate_limit_exceeded" and RETRY_KEY in trailers
        await stub.Prefill(llm_pb2.PrefillRequest(prompt=request.prompt), metadata=bob)
        running.cancel()
        async with asyncio.timeout(10):
            while True:
                try:
                    await stub.Prefill(llm_pb2.PrefillRequest(prompt=request.prompt), metadata=alice)
                    return
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    await asyncio.sleep(0.02)
