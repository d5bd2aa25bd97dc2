"""Which peers may call and map pools, by real certificates, and how many sessions they may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from trustme import CA

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer
from tests.embedding_transport.shipping.test_exporter import hello
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping import sessions as sessions_module
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import encoder_handlers
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules
from vitrine_vlm.embedding_transport.shipping.session_rpc import SessionServicer
from vitrine_vlm.embedding_transport.shipping.settings import PeerSettings
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.errors import BadRequest, Overloaded, PeerNotAllowed, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls


class WritingServicer(SessionServicer, StubServicer):  # type: ignore[misc]
    """The stub with methods as real services have them."""

    def _exporter(self) -> RowExporter:
        return self.exporter

    async def Encode(self, request, context):  # type: ignore[no-untyped-def,override]
        async for response in StubServicer.Encode(self, request, context):
            await context.write(response)

    async def GetStats(self, request, context):  # type: ignore[no-untyped-def]
        return encoder_pb2.GetStatsResponse()


@pytest.fixture(scope="module")
def ca() -> CA:
    return CA()


@asynccontextmanager
async def running(folder: Path, rules: PeerRules, ca: CA | None = None) -> AsyncIterator[tuple[str, RowExporter]]:
    exporter = RowExporter([ShmPool(folder, 1 << 20)], lease_ttl_s=30, rules=rules)
    exporter.start(Supervisor())
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((encoder_handlers(WritingServicer(exporter, IDENTITY), rules),))  # type: ignore[abstract]
    if ca is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        own = ca.issue_cert("127.0.0.1")
        pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_server_credentials([pair], ca.cert_pem.bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", exporter
    finally:
        await server.stop(None)
        await exporter.close()


def tls_of(ca: CA, folder: Path, name: str) -> ClientTls:
    own = ca.issue_cert(name)
    ca_file, cert_file, key_file = (folder / f"{name}-{kind}.pem" for kind in ("ca", "cert", "key"))
    ca.cert_pem.write_to_path(ca_file)
    own.cert_chain_pems[0].write_to_path(cert_file)
    own.private_key_pem.write_to_path(key_file)
    return ClientTls(ca_file, cert_file, key_file)


async def transport_of(address: str, folder: Path, tls: ClientTls, **options: str) -> str:
    """The transport that a client negotiates.

    Raises:
        VitrineError: why it cannot connect.
    """
    client = EncoderClient([address], IDENTITY, shm_folder=folder, tls=tls, **options)  # type: ignore[arg-type]
    try:
        await client.start()
        connection = next(iter(client._peers.values())).connection
        if connection is None:
            raise next(iter(client._peers.values())).error
        return connection.transport
    finally:
        await client.close()


async def test_peers_are_served_by_name(tmp_path: Path, ca: CA) -> None:
    settings = PeerSettings(allowed_peers="*.workers.example, gateway.example", shared_pool_peers="*.workers.example")
    async with running(tmp_path, settings.peer_rules(requires_certificates=True), ca) as (address, exporter):
        worker, gateway, stranger = (
            tls_of(ca, tmp_path, name) for name in ("a.workers.example", "gateway.example", "stranger.example")
        )
        assert await transport_of(address, tmp_path, worker) == "shm"
        assert await transport_of(address, tmp_path, gateway) == "grpc", "it may not see the rows of workers"
        with pytest.raises(TransportUnavailable, match="may not map the pools"):
            await transport_of(address, tmp_path, gateway, transport="shm")
        with pytest.raises(PeerNotAllowed, match=r"stranger\.example"):
            await transport_of(address, tmp_path, stranger)
        credentials = stranger.credentials()
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
            item = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=b"a 5")
            for call in (
                stub.Encode(encoder_pb2.EncodeRequest(items=[item])).read(),
                stub.EncodeInPieces(iter([encoder_pb2.EncodeRequest(items=[item])])).read(),
                stub.Release(encoder_pb2.ReleaseRequest()),
                stub.GetStats(encoder_pb2.GetStatsRequest()),
                stub.Connect(iter([hello("grpc")])).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert isinstance(error_from_rpc(caught.value), PeerNotAllowed)
        assert exporter.stats().sessions == 0


@pytest.mark.parametrize(
    ("allowed", "sharing", "transport"),
    [("", "", "grpc"), ("", "a.example", "shm"), ("a.example", "", "shm"), ("a.example", "b.example", "grpc")],
)
async def test_pools_are_shared_with_named_peers_only(
    tmp_path: Path, ca: CA, allowed: str, sharing: str, transport: str
) -> None:
    rules = PeerSettings(allowed_peers=allowed, shared_pool_peers=sharing).peer_rules(requires_certificates=True)
    async with running(tmp_path, rules, ca) as (address, _):
        assert await transport_of(address, tmp_path, tls_of(ca, tmp_path, "a.example")) == transport


def test_names_need_certificates() -> None:
    for settings in (PeerSettings(allowed_peers="a"), PeerSettings(shared_pool_peers="a")):
        with pytest.raises(ValueError, match="--tls-client-ca-file"):
            settings.peer_rules(requires_certificates=False)
    with pytest.raises(ValueError, match="no name of a peer"):
        PeerSettings(allowed_peers="a,,b")


Call = grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]


async def session(stub: encoder_pb2_grpc.EncoderAsyncStub) -> Call:
    """A session without a pool.

    Raises:
        VitrineError: why there is none.
    """
    call = stub.Connect()
    try:
        await call.write(hello("grpc"))
        response = await call.read()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        response = None
    if not isinstance(response, encoder_pb2.ConnectResponse):
        metadata = (await call.initial_metadata(), await call.trailing_metadata())
        error = error_from_rpc(grpc.aio.AioRpcError(await call.code(), *metadata, await call.details()))
        assert error is not None
        raise error
    return call


async def test_sessions_are_bounded_for_a_peer_and_in_all(tmp_path: Path, ca: CA) -> None:
    rules = PeerRules(max_sessions=5, max_sessions_per_peer=3)
    async with running(tmp_path, rules, ca) as (address, exporter), AsyncExitStack() as stack:
        stubs = []
        for name in ("a.example", "b.example", "c.example"):
            channel = grpc.aio.secure_channel(address, tls_of(ca, tmp_path, name).credentials())
            stubs.append(encoder_pb2_grpc.EncoderStub(await stack.enter_async_context(channel)))
        first, second, third = stubs
        calls = [await session(first) for _ in range(3)]
        with pytest.raises(Overloaded, match=r"3 connections of a\.example are open"):
            await session(first)
        calls += [await session(second) for _ in range(2)]
        with pytest.raises(Overloaded, match="5 connections are open"):
            await session(third)
        calls[0].cancel()
        async with asyncio.timeout(5):
            while exporter.stats().sessions == 5:
                await asyncio.sleep(0.01)
        await session(third)
        for call in calls:
            call.cancel()


async def test_a_connection_that_negotiates_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "_ANSWER_TIMEOUT_S", 1.0)
    rules = PeerRules(max_sessions_per_peer=2)
    async with running(tmp_path, rules) as (address, exporter), grpc.aio.insecure_channel(address) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        half, silent = stub.Connect(), stub.Connect()
        await half.write(hello("shm"))
        assert isinstance(await half.read(), encoder_pb2.ConnectResponse), "the offer of a pool"
        async with asyncio.timeout(5):
            while exporter._sessions._num_calls.total() < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match=r"2 connections of 127\.0\.0\.1"):
            await session(stub)
        for call in (silent, half):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert isinstance(error_from_rpc(caught.value), BadRequest)
        ended = await session(stub)
        assert exporter.stats().sessions == 1
        ended.cancel()


async def test_nothing_is_read_behind_a_negotiation(tmp_path: Path) -> None:
    """HTTP/2 keeps it with the peer, but for a window, however long the messages are."""
    async with running(tmp_path, PeerRules()) as (address, exporter), grpc.aio.insecure_channel(address) as channel:
        call = await session(encoder_pb2_grpc.EncoderStub(channel))
        long = hello("a" * (1 << 20))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                for _ in range(64):
                    await call.write(long)
        assert exporter.stats().sessions == 1
        call.cancel()
        async with asyncio.timeout(5):
            while exporter.stats().sessions:
                await asyncio.sleep(0.01)
