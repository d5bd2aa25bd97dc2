"""An encoder as a process beside language servers: it registers, drains, and shares its work with others."""

from __future__ import annotations

import asyncio
import random
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import zmq.asyncio
from aiohttp import web

from tests.encoder_service.running import png
from tests.encoder_service.sglang.running_port import Receiver, data_uri, encode_body
from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.integration.media_server import serve_media
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.ranks import rank_environment
from vitrine_vlm.encoder_service.server import EncoderServer, EncoderServicer
from vitrine_vlm.encoder_service.sglang.port import SglangPort
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.running_calls import RunningCalls

BASE = ("--sglang-version", "0.5.20", "--sglang-receivers", "127.0.0.1", "--allow-private-addresses")


@dataclass
class LanguageServer:
    """The list of encoders that a language server keeps, and what was asked of it."""

    url: str = ""
    encoders: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    status: int = 200

    async def change(self, request: web.Request) -> web.Response:
        self.asked.append(request.method)
        if self.status == 200:
            url = (await request.json())["url"]
            self.encoders.add(url) if request.method == "POST" else self.encoders.discard(url)
        return web.Response(status=self.status)


@asynccontextmanager
async def language_server(port: int = 0) -> AsyncIterator[LanguageServer]:
    server = LanguageServer()
    app = web.Application()
    app.router.add_post("/register_encoder_url", server.change)
    app.router.add_delete("/unregister_encoder_url", server.change)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def until(condition: object, timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def start(folder: Path, *flags: str) -> tuple[ServiceProcess, str]:
    port = free_port()
    process = ServiceProcess(
        "vitrine_vlm.encoder_service", "--model", str(folder), "--port", "0", *BASE, "--sglang-port", str(port), *flags
    )
    return process, f"http://127.0.0.1:{port}"


async def test_it_registers_while_it_serves_and_drains(qwen3_vl_folder: Path) -> None:
    later_port = free_port()
    async with language_server() as server, serve_media() as media, aiohttp.ClientSession() as session:
        encoder, url = start(qwen3_vl_folder, "--sglang-register", f"{server.url},http://127.0.0.1:{later_port}/")
        try:
            await asyncio.to_thread(encoder.wait_listening)
            async with session.get(f"{url}/health") as response:
                assert response.status == 503, "it loads"
            assert not server.asked
            await until(lambda: server.encoders == {url}, 60)
            async with session.get(f"{url}/health") as response:
                assert response.status == 200, "it is in no list before it serves"
            async with language_server(later_port) as later:
                await until(lambda: later.encoders == {url})
                # A part that is in the middle of it all when the signal comes.
                context = zmq.asyncio.Context()
                receiver = Receiver(context)
                media.files["/hangs"] = png(96, 64)
                body = encode_body(media.url("/hangs"))
                call = asyncio.create_task(session.post(f"{url}/encode", json=body).__aenter__())
                await media.num_waiting.acquire()
                encoder.process.send_signal(signal.SIGTERM)
                await until(lambda: not server.encoders and not later.encoders, 3)
                async with session.get(f"{url}/health") as response:
                    assert (response.status, await response.text()) == (503, "shutting down")
                await asyncio.sleep(0.6)
                async with session.post(f"{url}/encode", json=encode_body("data:,", req_id="new")) as response:
                    assert response.status == 503
                    assert "shutting down" in (await response.json())["message"]
                media.released.set()
                register = {"req_id": body["req_id"], "receive_count": 1, "receive_url": receiver.url}
                async with session.post(f"{url}/scheduler_receive_url", json=register) as response:
                    assert response.status == 200
                answer = await call
                assert (answer.status, await answer.json()) == (200, None)
                assert len(await receiver.read()) == 2
                context.destroy(linger=0)
            assert await asyncio.to_thread(encoder.process.wait, 30) == 0, encoder.lines
        finally:
            encoder.stop()
    assert server.asked[-1] == "DELETE"


async def test_a_part_that_does_not_end_is_cut_off_at_the_deadline(qwen3_vl_folder: Path) -> None:
    encoder, url = start(qwen3_vl_folder, "--drain-timeout-s", "2")
    try:
        await asyncio.to_thread(encoder.wait_serving)
        async with aiohttp.ClientSession() as session:
            call = asyncio.create_task(
                session.post(f"{url}/encode", json=encode_body(data_uri(png(64, 64)))).__aenter__()
            )
            await asyncio.sleep(0.5)
            encoder.process.send_signal(signal.SIGTERM)
            answer = await call
            assert answer.status == 503
            assert "did not complete in time" in (await answer.json())["message"]
        assert await asyncio.to_thread(encoder.process.wait, 30) == 0, encoder.lines
    finally:
        encoder.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sglang_version": ""}, "--sglang-version is ''"),
        ({"sglang_receivers": "10.0.0.1/8"}, "--sglang-receivers"),
        ({"sglang_register": "http://"}, "--sglang-register: 'http://' is not like http://HOST:8997"),
        ({"sglang_register": "http://a:1,host"}, "--sglang-register: 'host' is neither host:port nor"),
        ({"host": "0.0.0.0", "sglang_register": "http://127.0.0.1:1"}, "--sglang-advertise-host"),
        ({"sglang_peers": "dns:"}, "dns:"),
        ({"tls_cert_file": "c", "tls_key_file": "k", "tls_client_ca_file": "ca"}, "--tls-client-ca-file"),
    ],
)
async def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    metrics, calls = EncoderMetrics(), RunningCalls()
    server = EncoderServer(EncoderServicer(metrics, calls, ByteBudget(1)))
    lifecycle = Lifecycle(server, calls, EncoderUnavailable, 1.0)
    config = EncoderConfig(model="m", sglang_port=1, **({"sglang_version": "0.5.20"} | settings))
    with pytest.raises(ValueError, match=re.escape(message)):
        SglangPort(config, metrics, lifecycle)


def test_each_rank_has_a_port_of_its_own() -> None:
    config = EncoderConfig(model="m", dp=2, sglang_port=9000, device="cpu")
    assert [rank_environment(config, rank, {})["VITRINE_ENCODER_SGLANG_PORT"] for rank in (0, 1)] == ["9000", "9001"]


async def test_equal_pictures_meet_in_one_cache_whichever_encoder_is_asked(
    qwen3_vl_folder: Path,
) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    ports = [address.rpartition(":")[2] for address in addresses]
    started = [start(qwen3_vl_folder, "--port", port, "--sglang-peers", ",".join(addresses)) for port in ports]
    context = zmq.asyncio.Context()
    try:
        for encoder, _ in started:
            await asyncio.to_thread(encoder.wait_serving)
        # Until a peer is connected, the other one takes its items.
        for address in addresses:
            text = f"connected to encoder {address}"
            await until(lambda text=text: all(text in "\n".join(encoder.lines) for encoder, _ in started), 30)
        client = EncoderClient(addresses, None)
        await client.start()
        pictures = [png(96, 64, number) for number in range(8)]
        async with aiohttp.ClientSession() as session:

            async def rows_from(url: str, req_id: str, chosen: list[bytes]) -> bytes:
                receiver = Receiver(context)
                body = encode_body(*map(data_uri, chosen), req_id=req_id, embedding_port=receiver.port)
                async with session.post(f"{url}/encode", json=body) as response:
                    assert (response.status, await response.json()) == (200, None)
                return (await receiver.read())[1]

            found = {}
            for turn in range(4):  # as SGLang does: by count, in random order
                for number, (_, url) in enumerate(random.sample(started, 2)):
                    half = pictures[4 * number : 4 * number + 4]
                    found[turn, number] = await rows_from(url, f"{turn}-{number}", half)
            stats = (await client.encoder_stats()).values()
            assert sum(each.num_cache_misses for each in stats) == len(pictures)
            assert all(each.num_cache_misses for each in stats), "the pictures are spread over both"
            for number in (0, 1):
                assert len({found[turn, number] for turn in range(4)}) == 1
            # One encoder is lost: the other one does all.
            gone, left = random.sample(started, 2)
            gone[0].process.kill()
            again = await rows_from(left[1], "again", pictures[:4])
            expected = torch.frombuffer(bytearray(found[0, 0]), dtype=torch.float32)
            assert (torch.frombuffer(bytearray(again), dtype=torch.float32) - expected).abs().max() < 1e-4
            # What the owner says of an item is what the receiver learns.
            body = encode_body(data_uri(b"no picture"), req_id="bad", embedding_port=Receiver(context).port)
            async with session.post(f"{left[1]}/encode", json=body) as response:
                assert response.status == 400
                assert "no valid image" in (await response.json())["message"]
        await client.close()
    finally:
        context.destroy(linger=0)
        for encoder, _ in started:
            encoder.stop()
