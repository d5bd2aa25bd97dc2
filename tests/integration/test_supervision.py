"""A service that has lost one of its loops says so at once, fails its requests so that others can take them, and ends.

One exception is raised in each loop that the supervisors of running services own: a loop that is added is broken here,
too, by its name.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tests.encoder_service.test_command_line import free_port
from tests.gateway.upstream import Upstream, serve_upstreams
from tests.integration.breakable import BreakableService
from tests.integration.fleet import ServiceProcess
from tests.integration.media_server import MediaServer, serve_media
from tests.service_runtime.test_api_keys import ALICE, bearer, entry
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.service_runtime.health import health_status

DRAIN_TIMEOUT_S = 4.0
NOTICED_S = 1.0
STARTED_S = 20.0

# What must be among the names that are found, so that the test cannot pass for want of loops.
ENCODER = {"batch builder", "batch runner", "batch finisher", "jpeg batcher 0", "jpeg batcher 1", "embedding cache"}
ENCODER |= {"lease expiry", "sglang registration ADDRESS", "sglang peers", "decoder 0", "decoder 1"}
ENCODER |= {"encoder ADDRESS connection", "encoder ADDRESS releases"}
WORKER = {"engine", "discovery", "health", "encoder ADDRESS connection", "encoder ADDRESS releases", "lease expiry"}
GATEWAY = {"server ADDRESS health", "discovery of servers", "discovery of encoders", "health", "API keys"}
GATEWAY |= {"encoder ADDRESS connection", "encoder ADDRESS releases"}
DECODE = {"prefill worker ADDRESS connection", "prefill worker ADDRESS releases", "API keys"}


@pytest.fixture(scope="module")
def encoder(qwen3_vl_folder: Path) -> Iterator[ServiceProcess]:
    """That is not broken, for workers to connect to."""
    process = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(qwen3_vl_folder), "--port", "0")
    process.wait_serving()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def prefill_worker(qwen3_vl_folder: Path, encoder: ServiceProcess) -> Iterator[ServiceProcess]:
    flags = ["--model", str(qwen3_vl_folder), "--encoders", encoder.addresses["grpc"], "--role", "prefill"]
    process = ServiceProcess("vitrine_vlm.llm_worker", *flags, "--port", "0", "--grpc-port", "0")
    process.wait_serving()
    yield process
    process.stop()


@pytest.fixture
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


def shown(name: str) -> str:
    return re.sub(r"port \d+", "port PORT", re.sub(r"\S+:\d+", "ADDRESS", name))


def encoder_flags(folder: Path, peers: Path, language_server: str) -> list[str]:
    flags = ["--model", str(folder), "--port", "0"]
    flags += ["--sglang-port", str(free_port()), "--sglang-version", "0.5.20", "--sglang-peers", f"file:{peers}"]
    flags += ["--sglang-register", language_server]
    return [*flags, "--allow-private-addresses", "--drain-timeout-s", str(DRAIN_TIMEOUT_S)]


def worker_flags(folder: Path, *flags: str) -> list[str]:
    ports = ["--port", "0", "--grpc-port", "0", "--drain-timeout-s", str(DRAIN_TIMEOUT_S)]
    return ["--model", str(folder), *ports, *flags]


def keys_flags(folder: Path) -> list[str]:
    """Flags by which ALICE's key is needed."""
    file = folder / "keys"
    file.write_text(json.dumps({"keys": [entry(ALICE, "alice")]}))
    return ["--api-keys-file", str(file)]


async def refused(call: Any, code: str, name: str) -> None:
    """The call fails so that it can be tried elsewhere, and says which loop has ended."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value
    assert dict(caught.value.trailing_metadata() or ())[ERROR_CODE_KEY] == code
    assert name in (caught.value.details() or "")


async def until_not_serving(address: str) -> None:
    async with asyncio.timeout(NOTICED_S):
        while await health_status(address, 1.0) != "NOT_SERVING":
            await asyncio.sleep(0.02)


async def until_not_ready(session: aiohttp.ClientSession, url: str, name: str) -> None:
    """The engine fails its requests itself, just before the service notices its end."""
    async with asyncio.timeout(NOTICED_S):
        while True:
            async with session.get(f"{url}/ready") as response:
                if response.status == 503:
                    assert name in (await response.json())["reason"]
                    return
            await asyncio.sleep(0.02)


async def ends(service: BreakableService, name: str) -> None:
    """The process ends in time, and its log names the loop and has the traceback."""
    while service.process.is_alive() and time.monotonic() - service.broken_at < DRAIN_TIMEOUT_S + 0.5:
        await asyncio.sleep(0.02)
    log = service.log.read_text()
    assert service.process.exitcode == 1, log
    assert f"{name} ended with Injected" in log
    assert "Traceback" in log and "breakable.Injected" in log
    assert "ends without cleaning up" not in log, "it was to clean up in time"


async def names_with(expected: set[str], service: BreakableService) -> list[str]:
    """Names of all loops, once the expected ones are among them: a discovered peer's start after the service serves."""
    begin = time.monotonic()
    while True:
        names = await asyncio.to_thread(service.names)
        if expected <= set(map(shown, names)):
            return names
        assert time.monotonic() - begin < STARTED_S, names
        await asyncio.sleep(0.05)


@asynccontextmanager
async def broken(
    module: str, flags: Callable[[], list[str]], folder: Path, expected: set[str]
) -> AsyncIterator[AsyncIterator[tuple[BreakableService, dict[str, str], str]]]:
    """One service for each loop that there is, with its addresses and the loop's name.

    Each must end once it was broken, for which the next one does not wait.
    """
    services: list[BreakableService] = []

    def start() -> BreakableService:
        services.append(BreakableService(module, flags(), folder / f"{len(services)}.log"))
        return services[-1]

    async def each(endings: asyncio.TaskGroup) -> AsyncIterator[tuple[BreakableService, dict[str, str], str]]:
        first = start()
        await asyncio.to_thread(first.wait_serving)
        names = await names_with(expected, first)
        for _ in names[1:]:
            start()
        for service, name in zip(services, names, strict=True):
            addresses = await asyncio.to_thread(service.wait_serving)
            # Each service has ports of its own, and names of loops have the port in them.
            own = [each for each in await names_with({shown(name)}, service) if shown(each) == shown(name)]
            broken_name = name if name in own else own[0]
            yield service, addresses, broken_name
            endings.create_task(ends(service, broken_name))

    try:
        async with asyncio.TaskGroup() as endings:
            yield each(endings)
    finally:
        for service in services:
            service.stop()


async def break_worker(service: BreakableService, addresses: dict[str, str], name: str, model: str) -> None:
    url = f"http://{addresses['http']}"
    body = {"model": model, "prompt": "Hello", "max_tokens": 3000, "ignore_eos": True}
    sampling = llm_pb2.SamplingParams(max_tokens=3000, ignore_eos=True)
    request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling)
    session = aiohttp.ClientSession(headers=bearer(ALICE))
    metadata = tuple(bearer(ALICE).items())
    async with session, grpc.aio.insecure_channel(addresses["grpc"]) as channel:
        stub: llm_pb2_grpc.LlmAsyncStub = llm_pb2_grpc.LlmStub(channel)
        whole = asyncio.create_task(session.post(f"{url}/v1/completions", json=body).__aenter__())
        call = stub.Generate(request, metadata=metadata)
        assert await call.read() and await call.read()
        async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            await stream.content.readuntil(b"\n\n")
            service.break_loop(name)
            await refused(call, "worker_unavailable", name)
            events = (await stream.content.read()).decode().strip().split("\n\n")
            error = json.loads(events[-1].removeprefix("data: "))["error"]
            assert (error["code"], error["type"]) == ("worker_unavailable", "server_error")
            answer = await whole
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "worker_unavailable")
            assert int(answer.headers["Retry-After"]) > 0
        await until_not_ready(session, url, name)
        await until_not_serving(addresses["grpc"])
        assert time.monotonic() - service.broken_at < NOTICED_S
        await refused(stub.Generate(request, metadata=metadata), "worker_unavailable", name)
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")
        async with session.get(f"{url}/health") as response:
            assert response.status == 200, "it lives until it ends"


async def break_gateway(service: BreakableService, addresses: dict[str, str], name: str, upstream: Upstream) -> None:
    upstream.reset()
    upstream.gate.clear()
    url = f"http://{addresses['http']}"
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    async with aiohttp.ClientSession(headers=bearer(ALICE)) as session:
        whole = asyncio.create_task(session.post(f"{url}/v1/chat/completions", json=body).__aenter__())
        async with session.post(f"{url}/v1/chat/completions", json={**body, "stream": True}) as stream:
            await stream.content.readuntil(b"\n\n")
            service.break_loop(name)
            events = (await stream.content.read()).decode().strip().split("\n\n")
            error = json.loads(events[-1].removeprefix("data: "))["error"]
            assert (error["code"], error["type"]) == ("worker_unavailable", "server_error")
            assert name in error["message"]
            answer = await whole
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "worker_unavailable")
        await until_not_ready(session, url, name)
        await until_not_serving(addresses["grpc"])
        assert time.monotonic() - service.broken_at < NOTICED_S
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")


async def test_each_loop_of_an_encoder(
    qwen3_vl_folder: Path, tmp_path: Path, media_server: MediaServer, encoder: ServiceProcess
) -> None:
    peers = tmp_path / "encoders"
    peers.write_text(encoder.addresses["grpc"])
    flags = partial(encoder_flags, qwen3_vl_folder, peers, f"http://127.0.0.1:{free_port()}")
    async with broken("vitrine_vlm.encoder_service", flags, tmp_path, ENCODER) as services:
        async for service, addresses, name in services:
            item = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, url=media_server.url("/hangs"))
            request = encoder_pb2.EncodeRequest(items=[item])
            async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
                stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
                call = stub.Encode(request)
                reading = asyncio.create_task(refused(call, "encoder_unavailable", name))
                await media_server.num_waiting.acquire()
                service.break_loop(name)
                await reading
                await until_not_serving(addresses["grpc"])
                assert time.monotonic() - service.broken_at < NOTICED_S
                await refused(stub.Encode(request), "encoder_unavailable", name)


async def test_each_loop_of_a_worker(qwen3_vl_folder: Path, tmp_path: Path, encoder: ServiceProcess) -> None:
    addresses = tmp_path / "encoders"
    addresses.write_text(encoder.addresses["grpc"])
    flags = partial(worker_flags, qwen3_vl_folder, "--role", "prefill", "--encoders", f"file:{addresses}")
    async with broken("vitrine_vlm.llm_worker", flags, tmp_path, WORKER) as services:
        async for service, found, name in services:
            await break_worker(service, found, name, qwen3_vl_folder.name)


async def test_each_loop_of_a_gateway(tmp_path: Path, encoder: ServiceProcess) -> None:
    async with serve_upstreams(1) as (upstream,):
        (tmp_path / "servers").write_text(upstream.address)
        (tmp_path / "encoders").write_text(encoder.addresses["grpc"])
        sources = ["--servers", f"file:{tmp_path / 'servers'}", "--encoders", f"file:{tmp_path / 'encoders'}"]
        flags = [*sources, "--port", "0", "--grpc-port", "0", "--drain-timeout-s", str(DRAIN_TIMEOUT_S)]
        flags += keys_flags(tmp_path)
        async with broken("vitrine_vlm.gateway", lambda: flags, tmp_path, GATEWAY) as services:
            async for service, found, name in services:
                await break_gateway(service, found, name, upstream)


async def test_each_loop_of_a_worker_that_only_decodes(
    qwen3_vl_folder: Path, tmp_path: Path, prefill_worker: ServiceProcess
) -> None:
    decode = ["--role", "decode", "--prefill-workers", prefill_worker.addresses["grpc"]]
    flags = partial(worker_flags, qwen3_vl_folder, *decode, *keys_flags(tmp_path))
    async with broken("vitrine_vlm.llm_worker", flags, tmp_path, DECODE) as services:
        async for service, found, name in services:
            await break_worker(service, found, name, qwen3_vl_folder.name)
