"""Encoders that disconnect, refuse, break the protocol or stop answering: another encoder serves, or a named error."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from tests.embedding_transport.clients import encoder_stub
from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from tests.embedding_transport.shipping.test_exporter import PEER
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import SERVICE
from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import EncoderUnavailable, InternalError, LeaseExpired, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime import grpc_channel
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.types import MediaItem, RowsEvent

SERVER = """
import asyncio, sys
from pathlib import Path
from tests.embedding_transport.clients.encoder_stub import running_stub

async def main():
    async with running_stub(Path(sys.argv[1])) as (address, _, _):
        print(address, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


QUICK_KEEPALIVE = list(
    {
        **dict(CHANNEL_OPTIONS),
        "grpc.keepalive_time_ms": 300,
        "grpc.keepalive_timeout_ms": 500,
        "grpc.http2.ping_timeout_ms": 500,
        "grpc.http2.min_ping_interval_without_data_ms": 100,
    }.items()
)


def item(text: str) -> MediaItem:
    return MediaItem("image", data=text.encode())


async def encode(client: EncoderClient, *texts: str) -> list[RowsEvent]:
    events = client.encode([item(text) for text in texts], "request")
    return [event async for event in events if isinstance(event, RowsEvent)]


class CancelsEncode(StubServicer):
    """Ends every Encode with CANCELLED, like a proxy or a stopping server."""

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        content_hash = hashlib.sha256(request.items[0].data).digest()
        layout = encoder_pb2.Layout(grid_thw=[1, 2, 10], num_tokens=5, content_hash=content_hash)
        yield encoder_pb2.EncodeResponse(layout=layout)
        await context.abort(grpc.StatusCode.CANCELLED, "stopping")


class Drains(StubServicer):
    """Refuses every Encode like an encoder that shuts down."""

    async def Encode(self, request, context):  # type: ignore[no-untyped-def, override]
        await abort(context, EncoderUnavailable("the encoder is shutting down"))


class CancelsFirstConnect(StubServicer):
    num_connects = 0

    async def Connect(self, request_iterator, context):  # type: ignore[no-untyped-def]
        self.num_connects += 1
        if self.num_connects == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "not now")
        async for response in super().Connect(request_iterator, context):
            yield response


class BreaksFirstConnect(StubServicer):
    """Ends its first Connect before the peer has written anything."""

    num_connects = 0

    async def Connect(self, request_iterator, context):  # type: ignore[no-untyped-def]
        self.num_connects += 1
        if self.num_connects == 1:
            return
        async for response in super().Connect(request_iterator, context):
            yield response


class ForgetsSessions(StubServicer):
    """Like an encoder that was restarted on the same address."""

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        request.session_id = "0" * 32
        async for response in super().Encode(request, context):
            yield response


class HangsInStats(StubServicer):
    """Answers everything but GetStats."""

    is_asked = False

    async def GetStats(self, request, context):  # type: ignore[no-untyped-def]
        self.is_asked = True
        await asyncio.sleep(60)


class Says(StubServicer):
    """Answers every Encode with `responses`."""

    responses: list[encoder_pb2.EncodeResponse]

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        for response in self.responses:
            yield response


class Boasts(StubServicer):
    """Announces more rows than any memory holds."""

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        num_tokens = 1 << 30
        yield encoder_pb2.EncodeResponse(layout=encoder_pb2.Layout(grid_thw=[1, 2, 2 << 30], num_tokens=num_tokens))


@pytest.mark.parametrize("lost", [CancelsEncode, Drains])
async def test_a_refused_request_goes_to_another_encoder(tmp_path: Path, lost: type[StubServicer]) -> None:
    async with running_stub(tmp_path, servicer_class=lost) as first, running_stub(tmp_path) as second:
        client = EncoderClient([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        for number in range(32):  # some of them are at home on the first
            (event,) = await encode(client, f"{number} 5")
            event.rows.release()
        assert client.stats().retries > 0
        await client.close()


@pytest.mark.parametrize("lost", [CancelsEncode, Drains])
async def test_without_another_encoder_it_is_unavailable(tmp_path: Path, lost: type[StubServicer]) -> None:
    async with running_stub(tmp_path, servicer_class=lost) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        with pytest.raises(EncoderUnavailable, match=address):
            await encode(client, "a 5")
        await client.close()


async def test_without_another_encoder_a_draining_one_is_named_as_such(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        servicer.exporter.start_draining()
        async with asyncio.timeout(5):
            while client.ready:
                await asyncio.sleep(0.01)
        with pytest.raises(EncoderUnavailable, match=f"{address} is shutting down"):
            await encode(client, "a 5")
        await client.close()


async def test_a_caller_that_is_cancelled_is_cancelled(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        hanging = asyncio.create_task(encode(client, "hang 5"))
        async with asyncio.timeout(5):
            while not servicer.num_encodes:
                await asyncio.sleep(0.01)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert client.status()[0].in_flight == 0
        await client.close()


@pytest.mark.parametrize("servicer_class", [CancelsFirstConnect, BreaksFirstConnect])
async def test_connects_again_however_the_connection_broke(tmp_path: Path, servicer_class: type[StubServicer]) -> None:
    async with running_stub(tmp_path, servicer_class=servicer_class) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        with contextlib.suppress(TransportUnavailable):
            await client.start()
        await client.wait_ready(5)
        assert len(await encode(client, "a 5")) == 1
        await client.close()


async def test_connects_again_after_an_answer_that_is_none(tmp_path: Path) -> None:
    async def describe(request: bytes, context: object) -> bytes:
        return b"\xff"

    other = grpc.aio.server()
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(describe)
    }
    other.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    client = EncoderClient([f"127.0.0.1:{port}"], IDENTITY, shm_folder=tmp_path)
    await client.start()
    assert "cannot be connected to" in str(client.status()[0].error)
    await other.stop(None)
    async with running_stub(tmp_path, port=port):
        await client.wait_ready(10)
        assert len(await encode(client, "a 5")) == 1
    await client.close()


async def test_a_session_that_the_encoder_does_not_have_means_a_lost_encoder(tmp_path: Path) -> None:
    async with running_stub(tmp_path, servicer_class=ForgetsSessions) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        with pytest.raises(EncoderUnavailable, match="connect again"):
            await encode(client, "a 5")
        await client.close()


def layout(**changes: object) -> encoder_pb2.EncodeResponse:
    fields: dict[str, object] = {"item_index": 0, "grid_thw": [1, 2, 10], "num_tokens": 5} | changes
    return encoder_pb2.EncodeResponse(layout=encoder_pb2.Layout(**fields))  # type: ignore[arg-type]


def ready(**changes: int) -> encoder_pb2.EncodeResponse:
    fields = {"lease_id": 1, "generation": 1, "offset": 8192, "nbytes": 5 * IDENTITY.row_nbytes} | changes
    return encoder_pb2.EncodeResponse(ready=encoder_pb2.Ready(item_index=0, lease=encoder_pb2.Lease(**fields)))


def chunk(**changes: object) -> encoder_pb2.EncodeResponse:
    return encoder_pb2.EncodeResponse(chunk=encoder_pb2.Chunk(data=b"1234", **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "responses",
    [
        [encoder_pb2.EncodeResponse()],
        [layout(item_index=1)],
        [layout(num_tokens=6)],
        [layout(grid_thw=[1, 2])],
        [layout(grid_thw=[0, 2, 10], num_tokens=0)],
        [layout(grid_thw=[1, 3, 10])],
        [layout(), layout()],
        [ready()],
        [layout(), ready(nbytes=4 * IDENTITY.row_nbytes)],
        [layout(), ready(nbytes=1 << 63)],
        [layout(), ready(offset=8193)],
        [layout(), ready(offset=0)],
        [layout(), ready(offset=(1 << 20) + 4096 - 64)],
        [layout(), ready(offset=(1 << 64) - 64)],
        [chunk()],
        [layout(), chunk(item_index=1)],
        [layout(), chunk(offset=4)],
        [layout(), chunk(), chunk()],
        [layout(), chunk(offset=(1 << 64) - 1)],
    ],
    ids=range(19),
)
async def test_the_encoders_responses_are_checked(tmp_path: Path, responses: list[encoder_pb2.EncodeResponse]) -> None:
    async with running_stub(tmp_path, servicer_class=Says) as (address, servicer, _):
        servicer.responses = responses  # type: ignore[attr-defined]
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        with pytest.raises((InternalError, TransportUnavailable)):
            await encode(client, "a 5")
        assert client.ready and client.status()[0].in_flight == 0
        await client.close()


async def test_a_lease_of_another_generation_is_not_read(tmp_path: Path) -> None:
    async with running_stub(tmp_path, servicer_class=Says) as (address, servicer, _):
        servicer.responses = [layout(), ready(offset=4096 + 64)]  # type: ignore[attr-defined]
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        (event,) = await encode(client, "a 5")
        with pytest.raises(LeaseExpired):
            event.rows.check()
        event.rows.release()
        await client.close()
        assert servicer.exporter.stats().leases.unknown >= 1  # a release that close interrupts is sent again


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_more_rows_than_could_be_are_refused_before_a_prompt_is_made_of_them(
    tmp_path: Path, transport: TransportChoice
) -> None:
    async with running_stub(tmp_path, servicer_class=Boasts) as (address, _, _):
        client = EncoderClient([address], IDENTITY, transport=transport, shm_folder=tmp_path)
        await client.start()
        with pytest.raises(InternalError, match=f"{1 << 30} rows"):
            await encode(client, "a 5")
        await client.close()


async def test_an_encoder_that_stops_answering_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stopped process keeps its sockets open and answers nothing, like a host that lost its network.
    monkeypatch.setattr(grpc_channel, "CHANNEL_OPTIONS", QUICK_KEEPALIVE)
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(tmp_path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        hanging = asyncio.create_task(encode(client, "hang 5"))
        await asyncio.sleep(0.1)
        os.kill(server.pid, signal.SIGSTOP)
        async with asyncio.timeout(10):
            with pytest.raises(EncoderUnavailable, match=address):
                await hanging
            while client.ready:
                await asyncio.sleep(0.01)
        await client.close()
    finally:
        server.kill()
        await server.wait()


async def test_the_leases_of_a_peer_that_stops_answering_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_stub, "CHANNEL_OPTIONS", QUICK_KEEPALIVE)
    async with running_stub(tmp_path) as (address, servicer, _):
        peer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PEER, address, str(tmp_path), stdout=subprocess.PIPE
        )
        try:
            assert peer.stdout is not None
            assert [(await peer.stdout.readline()).strip() for _ in range(2)] == [b"LayoutEvent", b"RowsEvent"]
            os.kill(peer.pid, signal.SIGSTOP)
            async with asyncio.timeout(10):
                while servicer.exporter.stats().live_leases:
                    await asyncio.sleep(0.01)
            assert servicer.exporter.stats().leases.reclaimed == 1
        finally:
            peer.kill()
            await peer.wait()


async def test_an_idle_connection_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (grpc_channel, encoder_stub):
        monkeypatch.setattr(module, "CHANNEL_OPTIONS", QUICK_KEEPALIVE)
    async with running_stub(tmp_path) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        connection = next(iter(client._peers.values())).connection
        await asyncio.sleep(4)  # a server that minds pings without data closes the connection after three, 3.1 s
        assert connection is not None and next(iter(client._peers.values())).connection is connection
        await client.close()


async def test_loopback_and_cluster_traffic_ignores_the_environments_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with running_stub(tmp_path) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        assert client.ready
        await client.close()


async def test_cancelling_at_any_moment_leaves_no_lease_past_its_time(tmp_path: Path) -> None:
    rng = random.Random(0)
    async with running_stub(tmp_path, lease_ttl_s=0.3) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()

        async def take_and_release(number: int) -> None:
            async for event in client.encode([item(f"{number} {n}") for n in (1, 2, 3, 4)], "request"):
                if isinstance(event, RowsEvent):
                    event.rows.release()

        for number in range(60):
            task = asyncio.create_task(take_and_release(number))
            await asyncio.sleep(rng.uniform(0, 0.012))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert servicer.exporter.stats().leases.granted > 30
        async with asyncio.timeout(5):
            while servicer.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        stats = servicer.exporter.stats()
        assert stats.leases.granted == stats.leases.released + stats.leases.expired
        assert stats.pool_used_nbytes == {"shm": 0}
        await client.close()


async def test_a_channel_closed_under_a_request_is_a_lost_encoder(tmp_path: Path) -> None:
    """As if the Connect stream noticed the loss first: the request is not cancelled and may be retried."""
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        hanging = asyncio.create_task(encode(client, "hang 5"))
        async with asyncio.timeout(5):
            while not servicer.hangs:
                await asyncio.sleep(0.01)
        connection = next(iter(client._peers.values())).connection
        assert connection is not None
        await connection.channel.close()
        with pytest.raises(EncoderUnavailable, match="lost"):
            await asyncio.wait_for(hanging, 5)
        await client.close()


async def disconnect(peer: EncoderPeer) -> None:
    peer.connection = None


async def close_channel(peer: EncoderPeer) -> None:
    assert peer.connection is not None
    await peer.connection.channel.close()


class LosesTheFirstChoice(EncoderClient):
    """Loses the chosen encoder before the task that calls it runs, as its connection task may."""

    lose = staticmethod(disconnect)
    has_lost = False

    async def _encode(self, request, indices):  # type: ignore[no-untyped-def]
        await super()._encode(request, indices)
        chosen = [peer for peer in self._peers.values() if peer.in_flight]
        if not self.has_lost:
            self.has_lost = True
            await self.lose(*chosen)


class ClosesTheFirstChoice(LosesTheFirstChoice):
    lose = staticmethod(close_channel)


@pytest.mark.parametrize("client_class", [LosesTheFirstChoice, ClosesTheFirstChoice])
async def test_an_encoder_lost_between_choice_and_use_is_a_lost_encoder(
    tmp_path: Path, client_class: type[LosesTheFirstChoice]
) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second:
        client = client_class([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)
        (event,) = await encode(client, "a 5")
        assert (event.rows.num_tokens, client.stats().retries) == (5, 1)
        assert [status.in_flight for status in client.status()] == [0, 0]
        await client.close()
        alone = client_class([first[0]], IDENTITY, shm_folder=tmp_path)
        await alone.start()
        with pytest.raises(EncoderUnavailable, match=f"{first[0]} was lost"):
            await encode(alone, "a 5")
        await alone.close()


async def test_an_encoder_whose_channel_is_closed_has_no_stats_and_gets_no_releases(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        (event,) = await encode(client, "a 5")
        peer = next(iter(client._peers.values()))
        await close_channel(peer)
        assert await client.encoder_stats() == {}
        event.rows.release()
        async with asyncio.timeout(5):
            while peer.num_leases:  # otherwise it would never be disconnected
                await asyncio.sleep(0.01)
            while servicer.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        await client.close()


async def test_an_encoder_that_is_disconnected_during_get_stats_is_left_out(tmp_path: Path) -> None:
    async with running_stub(tmp_path, servicer_class=HangsInStats) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        asking = asyncio.create_task(client.encoder_stats(timeout_s=5))
        async with asyncio.timeout(5):
            while not servicer.is_asked:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
        client.set_addresses([])
        assert await asking == {}
        await client.close()
