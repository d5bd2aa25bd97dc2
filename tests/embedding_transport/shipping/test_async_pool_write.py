"""Async pool writes: when a block is allocated and released, and that it is not reused while it may be written to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from tests.embedding_transport.clients.encoder_stub import IDENTITY, running_stub
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderDescription
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection
from vitrine_vlm.embedding_transport.pools.fair_share import Holder
from vitrine_vlm.embedding_transport.pools.pool import ExportPool
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.shipping.async_pool_write import AsyncPoolWrite
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import ItemTimings

POOL_NBYTES = 16 << 10
ROWS = torch.arange(5.0 * IDENTITY.row_width).view(5, IDENTITY.row_width)


@asynccontextmanager
async def session(folder: Path) -> AsyncIterator[tuple[RowExporter, ExportPool, Connection[EncoderDescription]]]:
    """An exporter, its pool, and a peer that has mapped it."""
    async with running_stub(folder, pool_bytes=POOL_NBYTES) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=folder)
        await client.start()
        connection = next(iter(client._peers.values())).connection
        assert connection is not None and connection.transport == "shm"
        yield servicer.exporter, servicer.exporter._pools[0], connection
        await client.close()


async def export(exporter: RowExporter, session_id: str, pool_write: AsyncPoolWrite) -> encoder_pb2.Lease:
    (response,) = [each async for each in exporter.export(session_id, 0, TensorSource(ROWS), ItemTimings(), pool_write)]
    assert isinstance(response, encoder_pb2.EncodeResponse)
    return response.ready.lease


async def test_rows_are_in_the_pool_before_they_are_exported(tmp_path: Path) -> None:
    async with session(tmp_path) as (exporter, pool, connection):
        with exporter.async_pool_write(connection.session_id) as pool_write:
            pool_write.enqueue(ROWS)
            pool_write.batch_ended()
            used = pool.used_nbytes
            assert used > ROWS.nbytes
            lease = await export(exporter, connection.session_id, pool_write)
        assert pool.used_nbytes == used, "the block that was written is the one that is leased"
        assert connection.mapping is not None
        connection.mapping.check(lease.offset, lease.lease_id, lease.generation, lease.nbytes)
        shape = (len(ROWS), IDENTITY.row_width)
        assert torch.equal(connection.mapping.rows(lease.offset, shape, torch.float32), ROWS)
        assert exporter.release(connection.session_id, [lease.lease_id]) == (1, 0)
        assert pool.used_nbytes == 0


async def test_a_block_that_is_not_exported_is_released_once_its_batch_has_ended(tmp_path: Path) -> None:
    async with session(tmp_path) as (exporter, pool, connection):
        with exporter.async_pool_write(connection.session_id) as not_exported:
            not_exported.enqueue(ROWS)
        assert pool.used_nbytes > 0, "the batch may still write to it"
        not_exported.batch_ended()
        assert pool.used_nbytes == 0

        with exporter.async_pool_write(connection.session_id) as ended:
            ended.enqueue(ROWS)
            ended.batch_ended()
        assert pool.used_nbytes == 0

        with exporter.async_pool_write(connection.session_id) as cancelled_in_the_queue:
            pass
        cancelled_in_the_queue.enqueue(ROWS)
        assert pool.used_nbytes == 0
        cancelled_in_the_queue.batch_ended()


async def test_without_room_or_session_rows_are_written_when_they_are_exported(tmp_path: Path) -> None:
    async with session(tmp_path) as (exporter, pool, connection):
        rest = pool.allocate(pool.nbytes - 1024, lease_id=99)
        assert rest is not None
        with exporter.async_pool_write(connection.session_id) as pool_write:
            pool_write.enqueue(torch.zeros(100, IDENTITY.row_width))
            pool_write.batch_ended()
            pool.release(rest)
            assert pool.used_nbytes == 0
            lease = await export(exporter, connection.session_id, pool_write)
            assert lease.nbytes == ROWS.nbytes
        with exporter.async_pool_write("") as bytes_only:
            bytes_only.enqueue(ROWS)
            bytes_only.batch_ended()
            responses = exporter.export("", 0, TensorSource(ROWS), ItemTimings(), bytes_only)
            (chunk,) = [each async for each in responses]
            assert isinstance(chunk, bytes)


async def test_allocations_that_wait_for_room_come_before_async_writes(tmp_path: Path) -> None:
    async with session(tmp_path) as (exporter, pool, connection):
        holder = Holder("another", "session")
        held = exporter._leases.try_allocate(pool, pool.nbytes - 1024, holder)
        assert held is not None
        waiting = asyncio.create_task(exporter._leases.allocate(pool, 1024, holder))
        await asyncio.sleep(0)
        used_nbytes = pool.used_nbytes
        with exporter.async_pool_write(connection.session_id) as pool_write:
            pool_write.enqueue(ROWS[:1])
            assert pool.used_nbytes == used_nbytes
            pool_write.batch_ended()
        exporter._leases.release_block(held)
        allocated = await waiting
        assert allocated is not None
        exporter._leases.release_block(allocated)
