"""The Connect protocol and the limits of the pool, without the client."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.embedding_transport.clients.encoder_stub import IDENTITY, running_stub, synthetic_rows
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.pools import lease_manager
from vitrine_vlm.embedding_transport.pools.fair_share import Holder
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping import exporter as exporter_module
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.errors import BadRequest, EncoderUnavailable, Overloaded, TransportUnavailable, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import ItemTimings, MediaItem, RowsEvent

HOLDER = Holder("peer", "session")
PEER = """
import asyncio, sys
from pathlib import Path
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.types import MediaItem

async def main():
    client = EncoderClient([sys.argv[1]], None, shm_folder=Path(sys.argv[2]))
    await client.start()
    async for event in client.encode([MediaItem("image", data=b"a 5")], "request"):
        print(type(event).__name__, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def hello(*transports: str, version: int = 1) -> encoder_pb2.ConnectRequest:
    return encoder_pb2.ConnectRequest(hello=encoder_pb2.Hello(protocol_version=version, transports=transports))


def probe(nonce: bytes) -> encoder_pb2.ConnectRequest:
    return encoder_pb2.ConnectRequest(probe_result=encoder_pb2.ProbeResult(nonce=nonce))


async def connect(address: str, *requests: encoder_pb2.ConnectRequest) -> AsyncIterator[encoder_pb2.ConnectResponse]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = encoder_pb2_grpc.EncoderStub(channel).Connect()
        try:
            for request in requests:
                await call.write(request)
                response = await call.read()
                assert isinstance(response, encoder_pb2.ConnectResponse)
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) or error from error
        finally:
            call.cancel()


async def test_a_peer_that_cannot_read_the_nonce_gets_bytes_or_nothing(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, _, _):
        answers = [answer async for answer in connect(address, hello("shm", "grpc"), probe(b"wrong"))]
        assert answers[0].offer.shm.name.startswith("vitrine-")
        assert answers[1].session.transport == "grpc"
        with pytest.raises(TransportUnavailable):
            [answer async for answer in connect(address, hello("shm"), probe(b""))]


@pytest.mark.parametrize(
    ("requests", "error", "says"),
    [
        ([hello("shm", version=99)], BadRequest, "99"),
        ([hello("carrier_pigeon")], TransportUnavailable, "carrier_pigeon"),
        ([probe(b"")], BadRequest, "hello"),
        ([hello("shm"), hello("shm")], BadRequest, "probe_result"),
    ],
)
async def test_peers_that_do_not_follow_the_protocol(
    tmp_path: Path, requests: list[encoder_pb2.ConnectRequest], error: type[VitrineError], says: str
) -> None:
    async with running_stub(tmp_path) as (address, _, _):
        with pytest.raises(error, match=says):
            [answer async for answer in connect(address, *requests)]


async def export_all(exporter: RowExporter, session_id: str, rows: torch.Tensor) -> list[object]:
    return [response async for response in exporter.export(session_id, 0, TensorSource(rows), ItemTimings())]


async def test_an_unknown_session_must_connect_again(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (_, servicer, _):
        with pytest.raises(EncoderUnavailable, match="connect again"):
            await export_all(servicer.exporter, "unknown", torch.zeros(1, IDENTITY.row_width))


async def test_a_pool_that_stays_full_is_overload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_manager, "_POOL_WAIT_S", 0.1)
    async with running_stub(tmp_path, pool_bytes=16 << 10) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        [event async for event in client.encode([MediaItem("image", data=b"a 100")], "request")]
        with pytest.raises(Overloaded, match="pool"):
            [event async for event in client.encode([MediaItem("image", data=b"b 100")], "request")]
        await client.close()


async def test_rows_larger_than_the_pool_are_sent_as_bytes_if_the_peer_accepts_them(tmp_path: Path) -> None:
    item = MediaItem("image", data=b"large 1000")
    async with running_stub(tmp_path, pool_bytes=16 << 10) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        assert client.status()[0].transport == "shm"
        events = [event async for event in client.encode([item], "request")]
        rows = next(event.rows for event in events if isinstance(event, RowsEvent))
        main, deepstack = torch.zeros(1000, 8), torch.zeros(3, 1000, 8)
        rows.copy_to(main, deepstack, 0)
        assert torch.equal(torch.cat([main, *deepstack], dim=1), synthetic_rows(item.data or b"", 1000, IDENTITY))
        assert client.stats().received_nbytes["shm"] == 0 < client.stats().received_nbytes["grpc"]
        assert servicer.exporter.stats().oversize_items == 1
        await client.close()

        strict = EncoderClient([address], IDENTITY, transport="shm", shm_folder=tmp_path)
        await strict.start()
        with pytest.raises(TransportUnavailable, match="pool-bytes"):
            [event async for event in strict.encode([item], "request")]
        await strict.close()


async def test_waiting_for_room_is_first_come_first_served(tmp_path: Path) -> None:
    async with running_stub(tmp_path, pool_bytes=16 << 10) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        order: list[str] = []

        async def encode(name: str, num_tokens: int) -> RowsEvent:
            events = client.encode([MediaItem("image", data=f"{name} {num_tokens}".encode())], name)
            rows = [event async for event in events if isinstance(event, RowsEvent)]
            order.append(name)
            return rows[0]

        held = await encode("holds", 60)  # 7680 of 16384 bytes
        large = asyncio.create_task(encode("large", 100))
        await asyncio.sleep(0.1)
        small = asyncio.create_task(encode("small", 10))  # would fit, but came later
        await asyncio.sleep(0.1)
        assert order == ["holds"]
        held.rows.release()
        await asyncio.gather(large, small)
        await client.close()


async def test_an_allocation_that_waits_for_one_pool_does_not_block_another_pool(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    full, other = ShmPool(tmp_path, 4096), ShmPool(tmp_path / "other", 4096)
    manager = lease_manager.LeaseManager([full, other], lease_ttl_s=30, clock=time.monotonic)

    async def allocate(pool: ShmPool, nbytes: int) -> lease_manager.PoolBlock:
        allocated = await manager.allocate(pool, nbytes, HOLDER)
        assert allocated is not None
        return allocated

    held = await allocate(full, 4000)
    waiting = asyncio.create_task(allocate(full, 100))
    await asyncio.sleep(0)
    assert manager.try_allocate(full, 1, HOLDER) is None, "a waiting allocation comes first"
    manager.release_block(await asyncio.wait_for(allocate(other, 4000), 1))
    assert manager.try_allocate(other, 4000, HOLDER) is not None
    assert not waiting.done()
    manager.release_block(held)
    await asyncio.wait_for(waiting, 1)
    for pool in (full, other):
        pool.close()


async def test_a_block_is_written_to_its_end_however_often_its_export_is_cancelled() -> None:
    written = threading.Event()

    def write() -> None:
        time.sleep(0.2)
        written.set()

    export = asyncio.create_task(exporter_module._uncancelled(asyncio.to_thread(write)))
    for _ in range(3):
        await asyncio.sleep(0.01)
        export.cancel()
    with pytest.raises(asyncio.CancelledError):
        await export
    assert written.is_set()


async def test_drained_waits_for_the_last_lease(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        events = [event async for event in client.encode([MediaItem("image", data=b"a 5")], "request")]
        assert not await servicer.exporter.drained(0.05)
        servicer.exporter.start_draining()
        async with asyncio.timeout(5):
            while client.ready:
                await asyncio.sleep(0.01)
        waiting = asyncio.create_task(servicer.exporter.drained(5))
        rows = next(event.rows for event in events if isinstance(event, RowsEvent))
        rows.copy_to(torch.zeros(5, 8), torch.zeros(3, 5, 8), 0)  # still readable
        rows.release()
        assert await waiting
        await client.close()


async def test_a_service_that_drains_refuses_sessions_and_ends_open_ones_when_it_closes() -> None:
    async with running_stub(None) as (address, servicer, _), grpc.aio.insecure_channel(address) as channel:
        connect_to = encoder_pb2_grpc.EncoderStub(channel).Connect

        async def refused(call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down: connect to another one") as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        silent, session = connect_to(), connect_to()

        async def message() -> str | None:
            response = await session.read()
            assert isinstance(response, encoder_pb2.ConnectResponse)
            return response.WhichOneof("message")

        await session.write(hello("grpc"))
        assert await message() == "session"
        servicer.exporter.start_draining()
        await refused(connect_to())
        assert await message() == "draining"
        assert servicer.exporter.stats().sessions == 1
        await servicer.exporter.close()
        assert servicer.exporter.stats().sessions == 0
        await refused(session)
        await refused(silent)


async def test_a_killed_peers_leases_are_reclaimed(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        peer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PEER, address, str(tmp_path), stdout=subprocess.PIPE
        )
        assert peer.stdout is not None
        assert [(await peer.stdout.readline()).strip() for _ in range(2)] == [b"LayoutEvent", b"RowsEvent"]
        assert servicer.exporter.stats().live_leases == 1
        peer.send_signal(signal.SIGKILL)
        await peer.wait()
        async with asyncio.timeout(10):
            while servicer.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        assert servicer.exporter.stats().leases.reclaimed == 1
