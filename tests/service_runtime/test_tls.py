"""TLS over real connections: trusted clients and servers, and a certificate that is renewed in place."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
from pathlib import Path

import aiohttp
import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from tests.service_runtime.authority import Files, authority
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.health_command import main
from vitrine_vlm.service_runtime.metrics_port import MetricsPort, add_metrics
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls, ServerTls

SERVICE = "vitrine.test.v1.Test"


@pytest.fixture
def own(tmp_path: Path) -> Files:
    return authority(tmp_path / "own")


@pytest.fixture
def foreign(tmp_path: Path) -> Files:
    return authority(tmp_path / "foreign")


def copies_of(files: Files) -> tuple[Path, Path, Path]:
    """Copies, which stay as they are."""
    folder = files.ca.parent / "copies"
    folder.mkdir()
    ca, cert, key = (Path(shutil.copy(file, folder)) for file in (files.ca, files.cert, files.key))
    return ca, cert, key


async def status(address: str, tls: ClientTls | None) -> int:
    async with open_channel(address, tls) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=3)
        return int(response.status)


async def is_refused(address: str, tls: ClientTls | None) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await status(address, tls)
    return refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_client_must_trust_the_server(own: Files, foreign: Files) -> None:
    server = ServiceServer(SERVICE)
    address = await server.start("127.0.0.1", 0, ServerTls(own.cert, own.key))
    await server.set_serving(True)
    assert await status(address, ClientTls(own.ca)) == health_pb2.HealthCheckResponse.SERVING
    assert await is_refused(address, ClientTls(foreign.ca))
    assert await is_refused(address, None)
    await server.stop(0)


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
async def test_half_written_files_leave_the_certificate_as_it_is(own: Files, foreign: Files, name: str) -> None:
    """Nor does a key of another certificate, or what is no certificate, change it."""
    file, other = getattr(own, name), getattr(foreign, name)
    whole = file.read_bytes()
    client_files = copies_of(own)
    client = ClientTls(*client_files)
    server = ServiceServer(SERVICE)
    address = await server.start("127.0.0.1", 0, ServerTls(own.cert, own.key, own.ca))
    await server.set_serving(True)
    for written in (b"", whole[:100], b"hello", *([] if name == "ca" else [other.read_bytes()])):
        file.write_bytes(written)
        assert await status(address, client) == health_pb2.HealthCheckResponse.SERVING, written
        assert await is_refused(address, ClientTls(client_files[0], foreign.cert, foreign.key))
    file.write_bytes(whole)
    assert await status(address, client) == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)


async def test_an_empty_certificate_is_no_certificate(own: Files) -> None:
    own.cert.write_bytes(b"")
    with pytest.raises(OSError, match="is empty: write certificates into it"):
        await ServiceServer(SERVICE).start("127.0.0.1", 0, ServerTls(own.cert, own.key))


async def test_a_certificate_for_another_name_is_taken_if_that_name_is_expected(tmp_path: Path) -> None:
    """As where encoders are found by their pods' addresses, and have one certificate for all."""
    files = authority(tmp_path / "named", "encoders.media.svc")
    server = ServiceServer(SERVICE)
    address = await server.start("127.0.0.1", 0, ServerTls(files.cert, files.key))
    assert await is_refused(address, ClientTls(files.ca))
    assert await status(address, ClientTls(files.ca, server_name="encoders.media.svc"))
    assert await is_refused(address, ClientTls(files.ca, server_name="another.media.svc"))
    await server.stop(0)


async def test_with_mutual_tls_the_server_must_trust_the_client(own: Files, foreign: Files) -> None:
    server = ServiceServer(SERVICE)
    address = await server.start("127.0.0.1", 0, ServerTls(own.cert, own.key, own.ca))
    await server.set_serving(True)
    assert await status(address, ClientTls(own.ca, own.cert, own.key)) == health_pb2.HealthCheckResponse.SERVING
    assert await is_refused(address, ClientTls(own.ca))
    assert await is_refused(address, ClientTls(own.ca, foreign.cert, foreign.key))

    command = [address, "--service", SERVICE, "--ca-file", str(own.ca)]
    shown = ["--cert-file", str(own.cert), "--key-file", str(own.key)]
    assert await asyncio.to_thread(main, command) == 1
    assert await asyncio.to_thread(main, command + shown) == 0
    await server.set_serving(False)
    assert await asyncio.to_thread(main, command + shown) == 1
    await server.stop(0)
    assert await asyncio.to_thread(main, command + shown) == 1


async def test_a_certificate_can_be_renewed_in_place(own: Files, foreign: Files) -> None:
    server = ServiceServer(SERVICE)
    address = await server.start("127.0.0.1", 0, ServerTls(own.cert, own.key))
    await server.set_serving(True)
    assert await status(address, ClientTls(own.ca))
    for name in ("cert", "key"):
        shutil.copy(getattr(foreign, name), getattr(own, name))
    assert await status(address, ClientTls(foreign.ca))
    assert await is_refused(address, ClientTls(own.ca))
    own.cert.unlink()
    assert await status(address, ClientTls(foreign.ca)), "without its file the last certificate still holds"
    await server.stop(0)


def test_files_that_are_missing_are_named(tmp_path: Path, own: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="nowhere"):
        ServerTls(tmp_path / "nowhere", own.key).credentials()
    assert main(["127.0.0.1:9", "--ca-file", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


async def fetched(port: int, own: Files, shown: Files | None = None) -> int:
    """The status of a GET by a client that trusts the CA of `own`, on a connection of its own."""
    context = ssl.create_default_context(cafile=own.ca)
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    connector = aiohttp.TCPConnector(ssl=context, force_close=True)
    url = f"https://127.0.0.1:{port}/metrics"
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
        return response.status


def replace_files(old: Files, new: Files) -> None:
    for name in ("ca", "cert", "key"):
        shutil.copy(getattr(new, name), getattr(old, name))


async def test_http_certificates_can_be_renewed_in_place_too(own: Files, foreign: Files, tmp_path: Path) -> None:
    served = authority(tmp_path / "served")
    replace_files(served, own)
    application = web.Application()
    add_metrics(application, CollectorRegistry())
    async with contextlib.AsyncExitStack() as stack:
        tls = ServerTls(served.cert, served.key, served.ca)
        supervisor, metrics_port = Supervisor(), MetricsPort(application, DEFAULT_LIMITS)
        stack.push_async_callback(supervisor.close)
        stack.push_async_callback(metrics_port.close)
        address = await metrics_port.start("127.0.0.1", 0, tls, supervisor)
        port = int(address.rpartition(":")[2])
        assert await fetched(port, own, own) == 200
        for shown in (None, foreign):
            with pytest.raises(aiohttp.ClientError):
                await fetched(port, own, shown)
        replace_files(served, foreign)
        assert await fetched(port, foreign, foreign) == 200, "certificate, key and the CA of clients are the new ones"
        for trusted, shown in ((foreign, own), (own, foreign)):
            with pytest.raises(aiohttp.ClientError):
                await fetched(port, trusted, shown)
        served.key.write_text("not yet a key")
        assert await fetched(port, foreign, foreign) == 200, "while files do not fit, the last certificate still holds"
        served.cert.unlink()
        assert await fetched(port, foreign, foreign) == 200


def test_a_metrics_port_may_do_without_certificates_of_clients(own: Files) -> None:
    flags = ["--model", "m", "--encoders", "e:1", "--tls-cert-file", str(own.cert), "--tls-key-file", str(own.key)]
    flags += ["--tls-client-ca-file", str(own.ca)]
    for further, required in (([], own.ca), (["--no-metrics-client-auth"], None)):
        tls = LlmConfig.from_command_line([*flags, *further]).metrics_tls()
        assert tls is not None and tls.client_ca_file == required
