"""The worker channel with real pools, and two workers in threads of this process."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from vitrine_vlm.embedding_transport.pools.pool import PROBE_NBYTES
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.wire.messages import offer_to_proto
from vitrine_vlm.errors import LeaseExpired, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.vllm_connector.channel_path import check_private, make_private_folder
from vitrine_vlm.vllm_connector.messages import LENGTHS, MAX_HEADER_NBYTES, Answer, Hello, Map, Rows, pack_frame
from vitrine_vlm.vllm_connector.row_landing import RowLanding
from vitrine_vlm.vllm_connector.worker_channel import WorkerChannel
from vitrine_vlm.vllm_connector.worker_hub import RemoteMapper, RemoteMapping, WorkerHub

CPU = torch.device("cpu")
ROWS_TW = torch.arange(24, dtype=torch.float32).view(4, 6)


def rows(delivery_id: int) -> Rows:
    return Rows(delivery_id=delivery_id, num_tokens=4, row_width=6, dtype="float32")


@asynccontextmanager
async def connected(channel: Path, shm_folder: Path) -> AsyncIterator[tuple[WorkerHub, list[RowLanding]]]:
    supervisor = Supervisor()
    hub = WorkerHub(2, shm_folder, supervisor)
    landings = [RowLanding(CPU) for _ in range(2)]
    workers = [WorkerChannel(channel, rank, CPU, landing) for rank, landing in enumerate(landings)]
    for worker in workers:
        worker.start()  # before the scheduler's process listens, as in vLLM
    await hub.listen(channel)
    assert await hub.wait_connected(10) == "cpu"
    yield hub, landings
    for worker in workers:
        await asyncio.to_thread(worker.close)
    await hub.close()
    await supervisor.close()
    assert supervisor.failure is None


async def mapped(hub: WorkerHub, pool: ShmPool) -> RemoteMapping:
    mapper = RemoteMapper(hub, timeout_s=10)
    return await asyncio.to_thread(mapper.map, offer_to_proto(pool))


async def test_leased_rows_are_copied_and_an_expired_lease_is_noticed(tmp_path: Path, channel: Path) -> None:
    pool = ShmPool(tmp_path, 1 << 16)
    async with connected(channel, tmp_path) as (hub, landings):
        mapping = await mapped(hub, pool)
        assert mapping.read(0, PROBE_NBYTES) == pool.nonce
        assert mapping.rows(8192, (2, 8), torch.float32).is_meta
        with pytest.raises(TransportUnavailable, match="do not lie in the pool"):
            mapping.rows(1 << 20, (2, 8), torch.float32)
        block = pool.allocate(ROWS_TW.nbytes, lease_id=5)
        assert block is not None
        pool.write(block, TensorSource(ROWS_TW))
        lease = encoder_pb2.Lease(lease_id=5, generation=block.generation, offset=block.offset, nbytes=block.nbytes)
        await hub.land(mapping.pool_id, rows(1), lease)
        pool.release(block)
        with pytest.raises(LeaseExpired):
            await hub.land(mapping.pool_id, rows(2), lease)
        for landing in landings:
            cache: dict[str, torch.Tensor] = {}
            landing.load({"x": 1}, cache)
            assert torch.equal(cache["x"], ROWS_TW) and landing.num_landed == 1
            landing.load({"x": 1}, cache)  # vLLM has evicted it, and needs it again
            landing.discard([1, 2])
            assert landing.num_landed == 0
            with pytest.raises(RuntimeError, match="have not landed"):
                landing.load({"x": 1}, cache)
    pool.close()


async def test_a_pool_is_unmapped_once_nothing_refers_to_it(tmp_path: Path, channel: Path) -> None:
    pool = ShmPool(tmp_path, 1 << 16)
    async with connected(channel, tmp_path) as (hub, _):
        mapping = await mapped(hub, pool)
        pool_id = mapping.pool_id
        del mapping
        gc.collect()
        error = ""
        async with asyncio.timeout(10):
            while "is not mapped" not in error:
                with pytest.raises(TransportUnavailable) as raised:
                    await hub.land(pool_id, rows(1), encoder_pb2.Lease(offset=1 << 20))
                error = str(raised.value)
    pool.close()


async def test_a_pool_that_workers_cannot_map_falls_back(tmp_path: Path, channel: Path) -> None:
    pool = ShmPool(tmp_path, 1 << 16)
    (tmp_path / "elsewhere").mkdir()
    async with connected(channel, tmp_path / "elsewhere") as (hub, _):
        with pytest.raises(TransportUnavailable, match="both sides need the same host and folder"):
            await mapped(hub, pool)
        cuda = encoder_pb2.Offer(transport="cuda_ipc", cuda_ipc=encoder_pb2.CudaIpcPool(handle=b"x", nbytes=4096))
        with pytest.raises(TransportUnavailable, match="CUDA IPC handle of 1 bytes"):
            await asyncio.to_thread(RemoteMapper(hub, 10).map, cuda)
    pool.close()


async def test_a_pool_that_one_worker_cannot_map_is_unmapped_in_the_others(
    tmp_path: Path, channel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Map) -> bytes:
        raise TransportUnavailable("this worker sees another GPU")

    pool = ShmPool(tmp_path, 1 << 16)
    async with connected(channel, tmp_path) as (hub, landings):
        monkeypatch.setattr(landings[1], "map", fail)
        with pytest.raises(TransportUnavailable, match="this worker sees another GPU"):
            await mapped(hub, pool)
        async with asyncio.timeout(10):
            while landings[0]._pools:
                await asyncio.sleep(0.01)
    pool.close()


async def test_bytes_are_kept_and_discarded(tmp_path: Path, channel: Path) -> None:
    async with connected(channel, tmp_path) as (hub, landings):
        large = Rows(delivery_id=2, num_tokens=1000, row_width=2000, dtype="bfloat16")
        large_TW = torch.randn(1000, 2000).to(torch.bfloat16)
        await asyncio.gather(hub.land_bytes(rows(1), ROWS_TW), hub.land_bytes(large, large_TW))
        for landing in landings:
            cache: dict[str, torch.Tensor] = {}
            landing.load({"x": 1, "y": 2}, cache)
            assert torch.equal(cache["x"], ROWS_TW) and torch.equal(cache["y"], large_TW)
        await hub.discard(1)
        assert [landing.num_landed for landing in landings] == [1, 1]


async def test_what_is_no_worker_is_refused(tmp_path: Path, channel: Path) -> None:
    async with connected(channel, tmp_path) as (hub, landings):
        for sent in (
            pack_frame(Hello(rank=0, device="cpu")),  # there is one
            pack_frame(Hello(rank=2, device="cpu")),
            pack_frame(Answer(number=1)),
            LENGTHS.pack(MAX_HEADER_NBYTES + 1, 0),
            LENGTHS.pack(2, 1 << 40) + b"{}",
            struct.pack("<I", 7),
        ):
            reader, writer = await asyncio.open_unix_connection(channel)
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
        await hub.land_bytes(rows(1), ROWS_TW)
        assert [landing.num_landed for landing in landings] == [1, 1]


async def test_a_channel_that_breaks_the_protocol_fails_requests(tmp_path: Path, channel: Path) -> None:
    supervisor = Supervisor()
    hub = WorkerHub(1, tmp_path, supervisor)
    await hub.listen(channel)
    reader, writer = await asyncio.open_unix_connection(channel)
    writer.write(pack_frame(Hello(rank=0, device="cpu")))
    await hub.wait_connected(10)
    asked = asyncio.create_task(hub.discard(1))
    await reader.readexactly(LENGTHS.size)
    writer.write(LENGTHS.pack(3, 0) + b"[1]")
    with pytest.raises(TransportUnavailable, match="worker 0 cannot be reached"):
        await asked
    with pytest.raises(TransportUnavailable, match="worker 0 cannot be reached"):
        await hub.discard(1)
    writer.close()
    await hub.close()
    await supervisor.close()
    assert supervisor.failure is None


def test_the_sockets_folder_is_ones_own(channel: Path) -> None:
    folder = channel.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    os.chmod(folder, 0o750)
    for check in (check_private, make_private_folder):
        with pytest.raises(PermissionError, match="only this user can enter"):
            check(channel)


def test_folders_of_killed_engines_are_removed(channel: Path) -> None:
    killed, live = (channel.parent.with_name(f"{channel.parent.name}{suffix}") for suffix in ("a", "b"))
    listening = []
    for folder in (killed, live):
        folder.mkdir()
        listening.append(socket.socket(socket.AF_UNIX))
        listening[-1].bind(str(folder / channel.name))
        listening[-1].listen()
    listening[0].close()
    make_private_folder(channel)
    assert not killed.exists() and live.exists()
    listening[1].close()
