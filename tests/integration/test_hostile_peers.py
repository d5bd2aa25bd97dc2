"""Bytes that are no request, on every port: a clear answer, and a log that does not grow with them."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.service_runtime.authority import authority
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.service_runtime.log_limits import BUDGET_CHARS
from vitrine_vlm.types import PROTOCOL_VERSION

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
    b"GET /?token=SECRET\x1b[2J\n HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: SECRET\r\n\r\n",
    b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n",
    b"GET / HTTP/1.1\r\nAuthorization: Bearer SECRET" + b"a" * 20_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nSECRET" + bytes(200),
    b"\x16\x03\x01SECRET" + random.Random(1).randbytes(200),
    random.Random(2).randbytes(500),
]
NUM_ATTACKS = 40  # a port and kind of bytes


@pytest.fixture(scope="module")
def encoder(qwen3_vl_folder: Path) -> Iterator[ServiceProcess]:
    ports = {name: free_port() for name in ("metrics", "sglang")}
    flags = [flag for name, port in ports.items() for flag in (f"--{name}-port", str(port))]
    flags += ["--sglang-version", "0.5.20"]
    process = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(qwen3_vl_folder), "--port", "0", *flags)
    process.wait_serving()
    process.addresses |= {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    yield process
    process.stop()


@pytest.fixture(scope="module")
def worker(qwen3_vl_folder: Path, encoder: ServiceProcess) -> Iterator[ServiceProcess]:
    flags = ["--model", str(qwen3_vl_folder), "--encoders", encoder.addresses["grpc"], "--role", "prefill"]
    process = ServiceProcess("vitrine_vlm.llm_worker", *flags, "--port", "0", "--grpc-port", "0")
    process.wait_serving()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def gateway(encoder: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """With TLS on both ports, and no server that answers."""
    files = authority(tmp_path_factory.mktemp("tls") / "ca")
    flags = ["--servers", "127.0.0.1:1", "--encoders", encoder.addresses["grpc"], "--port", "0", "--grpc-port", "0"]
    flags += ["--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key)]
    process = ServiceProcess("vitrine_vlm.gateway", *flags)
    process.wait_listening()
    yield process
    process.stop()


async def messages(*raw: bytes) -> AsyncIterator[bytes]:
    for each in raw:
        yield each


async def answer(channel: grpc.aio.Channel, method: str, streams: bool, raw: bytes) -> tuple[grpc.StatusCode, str, str]:
    """The status, code and text with which a method answers these bytes."""
    call = channel.stream_stream(method)(messages(raw)) if streams else channel.unary_stream(method)(raw)
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
async def test_a_malformed_message_ends_a_session_with_its_code(encoder: ServiceProcess, raw: bytes) -> None:
    hello = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=["grpc"])
    async with grpc.aio.insecure_channel(encoder.addresses["grpc"]) as channel:
        call = channel.stream_stream("/vitrine.encoder.v1.Encoder/Connect")()
        await call.write(encoder_pb2.ConnectRequest(hello=hello).SerializeToString())
        assert encoder_pb2.ConnectResponse.FromString(await call.read()).session.session_id
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
    print(len(lines), sum(map(len, lines)), lines[:50])
    assert not any("SECRET" in line or "\x1b" in line for line in lines)
    assert sum(map(len, lines)) < 2 * BUDGET_CHARS
    assert process.process.poll() is None
