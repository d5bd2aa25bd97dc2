"""Bytes that are no request, on every port: a clear answer, and a log that does not grow with them.

And the secrets in URLs whose media cannot be had: they are in no answer, log, metric or span.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.integration.test_traces import Collector
from tests.service_runtime.authority import authority
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.service_runtime.log_limits import BUDGET_CHARS

COMMON = [
    *health_pb2.DESCRIPTOR.services_by_name.values(),
    *reflection_pb2.DESCRIPTOR.services_by_name.values(),
]
ENCODER = [*encoder_pb2.DESCRIPTOR.services_by_name.values(), *COMMON]
PREFILL_WORKER = [
    *llm_pb2.DESCRIPTOR.services_by_name.values(),
    *prefill_pb2.DESCRIPTOR.services_by_name.values(),
    *COMMON,
]
NOT_HTTP = [
    b"GET /?token=S3cr3t\x1b[2J\n HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: S3cr3t\r\n\r\n",
    b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nS3cr3t\r\n",
    b"GET / HTTP/1.1\r\nAuthorization: Bearer S3cr3t" + b"a" * 20_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nS3cr3t" + bytes(200),
    b"\x16\x03\x01S3cr3t" + random.Random(1).randbytes(200),
    random.Random(2).randbytes(500),
]
NUM_ATTACKS = 15  # a port and kind of bytes


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    """The endpoint for spans; at the end, when all services have sent theirs, there is no secret in them."""
    server, collector = grpc.server(ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(None)
    assert {"vitrine-encoder", "vitrine-llm"} <= {service for service, _ in collector.spans}
    assert "S3cr3t" not in str(collector.spans)


@pytest.fixture(scope="module")
def encoder(qwen3_vl_folder: Path, collector: str) -> Iterator[ServiceProcess]:
    ports = {name: free_port() for name in ("metrics", "sglang")}
    flags = [flag for name, port in ports.items() for flag in (f"--{name}-port", str(port))]
    flags += ["--sglang-version", "0.5.20", "--allow-private-addresses", "--media-timeout-s", "1"]
    flags += ["--otlp-endpoint", collector]
    process = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(qwen3_vl_folder), "--port", "0", *flags)
    process.wait_serving()
    process.addresses |= {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    yield process
    process.stop()


@pytest.fixture(scope="module")
def worker(qwen3_vl_folder: Path, encoder: ServiceProcess, collector: str) -> Iterator[ServiceProcess]:
    flags = ["--model", str(qwen3_vl_folder), "--encoders", encoder.addresses["grpc"], "--role", "prefill"]
    flags += ["--otlp-endpoint", collector]
    process = ServiceProcess("vitrine_vlm.llm_worker", *flags, "--port", "0", "--grpc-port", "0")
    process.wait_serving()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def gateway(
    encoder: ServiceProcess, worker: ServiceProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """With TLS on both ports."""
    files = authority(tmp_path_factory.mktemp("tls") / "ca")
    flags = [
        "--servers",
        worker.addresses["http"],
        "--encoders",
        encoder.addresses["grpc"],
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    flags += ["--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key)]
    process = ServiceProcess("vitrine_vlm.gateway", *flags)
    process.wait_serving()
    yield process
    process.stop()


async def messages(*raw: bytes) -> AsyncIterator[bytes]:
    for each in raw:
        yield each


async def answer(channel: grpc.aio.Channel, method: str, streams: bool, raw: bytes) -> tuple[grpc.StatusCode, str, str]:
    """The status, code and text with which a method answers these bytes."""
    untyped: Any = channel
    call = untyped.stream_stream(method)(messages(raw)) if streams else untyped.unary_stream(method)(raw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    metadata = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), str(metadata.get(ERROR_CODE_KEY)), caught.value.details() or ""


async def refuses_garbage(process: ServiceProcess, services: list[ServiceDescriptor]) -> None:
    methods = [
        (f"/{service.full_name}/{method.name}", method.client_streaming)
        for service in services
        for method in service.methods
        if method.name != "List"  # grpc.health.v1's, which grpcio does not implement
    ]
    before = len(process.lines)
    async with grpc.aio.insecure_channel(process.addresses["grpc"]) as channel:
        for method, streams in methods:
            for raw in (b"\xff\xfe\xfd", b"\x0a\xff\xff\xff\xff\x0f"):
                status, code, text = await answer(channel, method, streams, raw)
                assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request"), (method, raw, text)
                assert text == f"{len(raw)} bytes are not the protobuf message that {method} takes: see its .proto"
        await asyncio.gather(*(answer(channel, *method, b"\xff" * 100) for method in methods * NUM_ATTACKS))
    lines = process.lines[before:]
    assert any("are not the protobuf message" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
    assert sum(map(len, lines)) < 2 * BUDGET_CHARS


async def test_malformed_messages_to_an_encoder(encoder: ServiceProcess) -> None:
    await refuses_garbage(encoder, ENCODER)


async def test_malformed_messages_to_a_worker(worker: ServiceProcess) -> None:
    await refuses_garbage(worker, PREFILL_WORKER)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"])
async def test_a_malformed_first_message_ends_a_session_with_its_code(encoder: ServiceProcess, raw: bytes) -> None:
    async with grpc.aio.insecure_channel(encoder.addresses["grpc"]) as channel:
        call: Any = channel.stream_stream("/vitrine.encoder.v1.Encoder/Connect")()
        await call.write(raw)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(await call.trailing_metadata())[ERROR_CODE_KEY] == "invalid_request"
        await encoder_pb2_grpc.EncoderStub(channel).Describe(encoder_pb2.DescribeRequest())
    assert not any("never retrieved" in line for line in encoder.lines)


def send(address: str, raw: bytes, *, reset: bool = False) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(0.02)
        if reset:  # at the end, while the service still writes
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        try:
            connection.sendall(raw)
            if not reset:
                connection.recv(4096)
        except OSError:
            pass


def attack(address: str) -> None:
    for raw in NOT_HTTP:
        send(address, raw)
    for _ in range(NUM_ATTACKS):
        for raw in NOT_HTTP:
            send(address, raw, reset=True)
        send(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", reset=True)


@pytest.mark.parametrize("service", ["encoder", "worker", "gateway"])
async def test_the_log_does_not_grow_with_what_is_no_request(service: str, request: pytest.FixtureRequest) -> None:
    process: ServiceProcess = request.getfixturevalue(service)
    before = len(process.lines)
    for address in process.addresses.values():
        await asyncio.to_thread(attack, address)
    await asyncio.sleep(0.2)
    lines = process.lines[before:]
    assert not any("S3cr3t" in line or "\x1b" in line for line in lines)
    assert sum(map(len, lines)) < 2 * BUDGET_CHARS
    assert process.process.poll() is None


@asynccontextmanager
async def failing_media() -> AsyncIterator[str]:
    """The host and port of a web server that has no picture for anyone, in several ways."""

    async def answer(request: web.Request) -> web.StreamResponse:
        locations = {
            "/query": "/missing?token=S3cr3t",
            "/user": f"http://user:S3cr3t@{request.host}/text?token=S3cr3t",
            "/scheme": "ftp://user:S3cr3t@host/?token=S3cr3t",
            "/invalid": "http://user:S3cr3t[@host/?token=S3cr3t",
            "/circle": "/circle?token=S3cr3t",
        }
        if request.path in locations:
            return web.Response(status=302, headers={"Location": locations[request.path]})
        if request.path == "/hangs":
            await asyncio.sleep(5)
        if request.path == "/cut":
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=404 if request.path == "/missing" else 200, text="no picture")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def secret_urls(host: str) -> list[str]:
    paths = ("missing", "hangs", "query", "user", "scheme", "invalid", "circle", "text", "cut")
    query = "?X-Amz-Signature=S3cr3t&token=S3cr3t#S3cr3t"
    return [
        *(f"http://user:S3cr3t@{host}/{path}{query}" for path in paths),
        *(f"{scheme}user:S3cr3t@{host}/a{query}" for scheme in ("https://", "ftp://", "http:/", "", "http://x[")),
        *(f"http://user:S3cr3t@{at}/a{query}" for at in ("no-such-host.invalid", "127.0.0.1:1", "0x7f.1", "h:S3cr3t")),
        f"file:///a{query}",
        "data:image/png;base64,S3cr3t!",
        "data:image/png;base64,S3cr3t==",
        "data:S3cr3t",
    ]


async def refused_by_grpc(worker: str, encoder: str, url: str) -> str:
    """What both services answer over gRPC."""
    async with grpc.aio.insecure_channel(worker) as channel, grpc.aio.insecure_channel(encoder) as to_encoder:
        item = llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, url=url)
        text = "<|vision_start|><|image_pad|><|vision_end|>"
        request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text=text, media=[item]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await llm_pb2_grpc.LlmStub(channel).Generate(request).read()
        own = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, url=url)
        encoding = encoder_pb2_grpc.EncoderStub(to_encoder).Encode(encoder_pb2.EncodeRequest(items=[own]))
        failed = [str(response) async for response in encoding]
    return f"{caught.value!r} {failed}"


async def test_secrets_in_urls_are_nowhere(
    encoder: ServiceProcess, worker: ServiceProcess, gateway: ServiceProcess, qwen3_vl_folder: Path
) -> None:
    chats = [f"http://{worker.addresses['http']}", f"https://{gateway.addresses['http']}"]

    async def answers(session: aiohttp.ClientSession, url: str) -> list[str]:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        chat = {"model": qwen3_vl_folder.name, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        part = {"req_id": "r", "num_parts": 1, "part_idx": 0, "modality": "IMAGE", "mm_items": [url]}
        bodies = [(f"{at}/v1/chat/completions?key=S3cr3t", chat) for at in chats]
        bodies += [(f"http://{encoder.addresses['sglang']}/encode?key=S3cr3t", part)]
        texts = [await refused_by_grpc(worker.addresses["grpc"], encoder.addresses["grpc"], url)]
        for address, body in bodies:
            async with session.post(address, json=body, ssl=False) as answer:
                assert answer.status >= 400, (address, url)
                texts.append(f"{answer.headers} {await answer.text()}")
        return texts

    async with failing_media() as host, aiohttp.ClientSession() as session:
        urls = secret_urls(host)
        answered = await asyncio.gather(*(answers(session, url) for url in urls))
        pages = [f"{chats[0]}/metrics", f"{chats[1]}/metrics", f"http://{encoder.addresses['metrics']}/metrics"]
        for page in pages:
            async with session.get(page, ssl=False) as answer:
                answered.append([await answer.text()])
    shown = [text for texts in answered for text in texts if "S3cr3t" in text]
    assert not shown
    assert sum("/missing" in text for texts in answered for text in texts) > 3, "messages name the URL"
    lines = [line for process in (encoder, worker, gateway) for line in process.lines]
    assert not [line for line in lines if "S3cr3t" in line]
    assert any("does not exist" in line for line in lines)
