"""A gateway as a process: its settings, its end, its probes."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2_grpc

from tests.gateway.conftest import start_gateway
from tests.gateway.test_media import PICTURES, all_released, ask, image
from tests.gateway.upstream import serve_upstreams
from tests.integration.fleet import ServiceProcess
from tests.service_runtime.test_api_keys import ALICE, BOB, bearer, entry
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.gateway.http import GatewayHttp
from vitrine_vlm.gateway.metrics import GatewayMetrics
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.health import health_status
from vitrine_vlm.service_runtime.http_access import OPEN_PATHS
from vitrine_vlm.service_runtime.running_calls import RunningCalls

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}
NEEDED = ["--servers", "127.0.0.1:1", "--encoders", "127.0.0.1:2"]


async def test_requests_in_flight_complete_and_new_ones_are_refused(encoder: ServiceProcess) -> None:
    async with (
        serve_upstreams(1) as (upstream,),
        start_gateway(encoder.addresses["grpc"], upstreams=[upstream]) as gateway,
    ):
        upstream.gate.clear()
        assert await health_status(gateway.process.addresses["grpc"], 2.0) == "SERVING"
        running = [
            asyncio.create_task(gateway.client.post(CHAT, json=body).__aenter__())
            for body in (BODY, ask(image(PICTURES[0])), BODY | {"stream": True})
        ]
        while len(upstream.seen) < 3:
            await asyncio.sleep(0.01)
        gateway.process.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await gateway.client.get("/ready")).status == 200:
                await asyncio.sleep(0.02)
        async with gateway.client.post(CHAT, json=BODY) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")
        upstream.gate.set()
        for response in await asyncio.gather(*running):
            assert response.status == 200
            assert " three" in await response.text()
        assert await asyncio.to_thread(gateway.process.process.wait, 10) == 0
        await all_released(encoder)


async def test_what_takes_too_long_is_cut_off_with_an_error(encoder: ServiceProcess) -> None:
    async with (
        serve_upstreams(1) as (upstream,),
        start_gateway(encoder.addresses["grpc"], ["--drain-timeout-s", "1"], [upstream]) as gateway,
    ):
        upstream.gate.clear()
        whole = asyncio.create_task(gateway.client.post(CHAT, json=ask(image(PICTURES[0]))).__aenter__())
        async with gateway.client.post(CHAT, json=BODY | {"stream": True}) as stream:
            await stream.content.readuntil(b"\n\n")
            while len(upstream.seen) < 2:
                await asyncio.sleep(0.01)
            since = time.monotonic()
            gateway.process.process.send_signal(signal.SIGTERM)
            last = (await stream.text()).strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_unavailable"
        answer = await whole
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "worker_unavailable")
        assert await asyncio.to_thread(gateway.process.process.wait, 10) == 0
        assert time.monotonic() - since < 3.5
        await all_released(encoder)


async def test_before_servers_with_encoders_of_their_own_media_pass_as_they_are() -> None:
    async with (
        serve_upstreams(2) as upstreams,
        start_gateway(None, ["--health-path", "/ready", "--max-items", "1", "--tenant", "a"], upstreams) as gateway,
    ):
        async with gateway.client.get("/ready") as response:
            assert (response.status, [*await response.json()]) == (200, ["ready", "servers"])
        body = ask(image(PICTURES[0]))
        async with gateway.client.post(CHAT, json=body, headers={"X-Vitrine-Tenant": "b"}) as response:
            # These servers have no tower.
            assert (await response.json())["error"]["message"] == "At most 0 image_url(s) may be provided in one prompt"
        async with gateway.client.post(CHAT, json=ask(image(PICTURES[0]), image(PICTURES[1]))) as response:
            assert (await response.json())["error"]["code"] == "too_many_items"
        (seen,) = [each for upstream in upstreams for each in upstream.seen]
        assert (json.loads(seen.raw), seen.headers["X-Vitrine-Tenant"]) == (body, "a")
        upstreams[0].health = upstreams[1].health = 503
        async with asyncio.timeout(5):
            while (await gateway.client.get("/ready")).status == 200:
                await asyncio.sleep(0.02)


async def test_without_encoders_and_servers_it_answers_and_is_not_ready() -> None:
    flags = [*NEEDED, "--port", "0", "--grpc-port", "0", "--connect-timeout-s", "1"]
    process = ServiceProcess("vitrine_vlm.gateway", *flags)
    try:
        addresses = await asyncio.to_thread(process.wait_serving)
        async with aiohttp.ClientSession(f"http://{addresses['http']}") as client:
            async with client.get("/ready") as response:
                details = await response.json()
                assert response.status == 503
            assert details["servers"][0]["error"].startswith("/health cannot be reached")
            assert not details["encoders"][0]["ready"]
            async with client.get("/health") as response:
                assert response.status == 200
            async with client.post(CHAT, json=BODY) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")
            async with client.post(CHAT, json=ask(image(PICTURES[0]))) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")
        assert await health_status(addresses["grpc"], 2.0) == "NOT_SERVING"
    finally:
        assert await asyncio.to_thread(process.stop) == 0


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--encoders", "127.0.0.1:1"],
        ["--servers", "127.0.0.1:1", "--health-path", "ready"],
        ["--servers", "nowhere", "--encoders", "127.0.0.1:1"],
        [*NEEDED, "--tenant-header", "two words"],
        [*NEEDED, "--max-in-flight", "0"],
        [*NEEDED, "--transport", "shm"],
        [*NEEDED, "--server-name", "servers.svc"],
        [*NEEDED, "--server-ca-file", "ca.pem", "--server-cert-file", "cert.pem"],
    ],
)
def test_wrong_settings_are_refused(flags: list[str]) -> None:
    with pytest.raises((ValueError, SystemExit)):
        GatewayConfig.from_command_line(flags)


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITRINE_GATEWAY_TENANT", "a")
    (tmp_path / "settings.yaml").write_text("max_items: 3\ntenant_header: X-Tenant\n")
    config = GatewayConfig.from_command_line([*NEEDED, "--config", str(tmp_path / "settings.yaml")])
    assert (config.tenant, config.max_items, config.tenant_header) == ("a", 3, "X-Tenant")


async def test_keys_have_tenants_and_stay_here(encoder: ServiceProcess, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(json.dumps({"keys": [entry(ALICE, "alice", "a"), entry(BOB, "bob", media_bytes_per_minute=10)]}))
    flags = ["--api-keys-file", str(file), "--tenant", "default", "--tenant-header", "X-Tenant"]
    async with (
        serve_upstreams(1) as (upstream,),
        start_gateway(encoder.addresses["grpc"], flags, [upstream]) as gateway,
    ):
        for path in ("/v1/models", CHAT, "/metrics"):
            async with gateway.client.get(path) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (401, "invalid_api_key")
        assert not [seen for seen in upstream.seen if seen.path != "/health"]
        for key, tenant in ((ALICE, "a"), (BOB, "b")):
            headers = bearer(key) | {"X-Tenant": "b"}
            async with gateway.client.post(CHAT, json=ask(image(PICTURES[0])), headers=headers) as response:
                assert response.status == 200
            seen = upstream.seen[-1]
            assert [each["tenant"] for each in seen.body["ec_transfer_params"].values()] == [tenant]
            assert "Authorization" not in seen.headers
        async with gateway.client.post(CHAT, json=ask(image(PICTURES[0])), headers=bearer(BOB)) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (429, "rate_limit_exceeded")
        async with gateway.client.get("/ready") as response:
            assert response.status == 200
        address = gateway.process.addresses["grpc"]
        assert await health_status(address, 2.0) == "SERVING"
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([]))))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_every_route_is_a_probe_or_passes_the_check() -> None:
    """The check is of the whole application; what it leaves open is named."""
    config = GatewayConfig(servers="127.0.0.1:1", encoders="127.0.0.1:2")
    http = GatewayHttp(config, GatewayMetrics(), lambda: (False, {}), RunningCalls(), Access())
    paths = {each.canonical for each in http.application().router.resources()}
    assert paths & OPEN_PATHS == {"/health", "/ready"}
    assert paths - OPEN_PATHS == {CHAT, "/v1/{path}", "/metrics"}
