"""The shipping side of the transports: rows of an item go into a pool under a lease, or leave as chunks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcPool
from vitrine_vlm.embedding_transport.pools.leases import LeaseCounts
from vitrine_vlm.embedding_transport.pools.lending import Held, Lending
from vitrine_vlm.embedding_transport.pools.pool import ExportPool
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.early_write import EarlyWrite
from vitrine_vlm.embedding_transport.shipping.sessions import Session, Sessions
from vitrine_vlm.embedding_transport.wire.chunk_codec import encode_chunk
from vitrine_vlm.embedding_transport.wire.messages import timings_to_proto
from vitrine_vlm.errors import EncoderUnavailable, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ItemTimings

CHUNK_NBYTES = 1024 * 1024


@dataclass(frozen=True)
class ExporterStats:
    """Snapshot for metrics: lease ends since the start, leases alive, bytes of the pools and in use, bytes shipped.

    pool_nbytes, pool_used_nbytes, shipped_nbytes: by transport.
    oversize_items: sent as bytes to a peer that has a pool, because they were larger than the whole pool.
    """

    leases: LeaseCounts
    live_leases: int
    sessions: int
    pool_nbytes: dict[str, int]
    pool_used_nbytes: dict[str, int]
    shipped_nbytes: dict[str, int]
    oversize_items: int


def export_pools(
    device: torch.device, cuda_ipc_nbytes: int, shm_folder: Path | None, shm_nbytes: int
) -> list[ExportPool]:
    """What peers on this host can map, best first.

    Args:
        device: where rows are made.
        cuda_ipc_nbytes: of a pool there; 0 for none. shm_folder: None for no pool in shared memory.

    Raises:
        TransportUnavailable: no room for one of them.
    """
    pools: list[ExportPool] = []
    if device.type == "cuda" and cuda_ipc_nbytes:
        pools.append(CudaIpcPool(device, cuda_ipc_nbytes))
    if shm_folder is not None:
        pools.append(ShmPool(shm_folder, shm_nbytes))
    return pools


class RowExporter:
    """Ships rows by the transport that each peer has negotiated. One per process; lives on one event loop.

    Args:
        pools: what is offered, best first; without any, rows go as bytes ("grpc").
        lease_ttl_s: life of a lease that nobody releases, seconds.
        chunk_nbytes: bytes of rows in one message of the "grpc" transport.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        pools: Sequence[ExportPool],
        *,
        lease_ttl_s: float,
        chunk_nbytes: int = CHUNK_NBYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._pools = list(pools)
        self._lending = Lending(self._pools, lease_ttl_s, clock)
        self._sessions = Sessions(self._pools, lease_ttl_s, self._lending.reclaim)
        self._num_oversize_items = 0
        self.transports = self._sessions.transports
        self._shipped_nbytes = dict.fromkeys(self.transports, 0)

    def start(self, supervisor: Supervisor) -> None:
        """Begins to expire leases; the supervisor owns the loop that does."""
        self._lending.start(supervisor)

    async def close(self) -> None:
        await self._lending.close()
        for pool in self._pools:
            pool.close()

    def connect(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest]
    ) -> AsyncIterator[encoder_pb2.ConnectResponse]:
        """The whole Connect call, see `Sessions.connect`. When it ends, in whatever way, its leases are reclaimed."""
        return self._sessions.connect(requests)

    @contextlib.contextmanager
    def early_write(self, session_id: str) -> Iterator[EarlyWrite]:
        """For an item of this session whose rows are still to be made; to be handed to `export` with them."""
        session = self._sessions.get(session_id)
        pool = session.pool if session is not None else None

        def take(rows_TW: torch.Tensor) -> Held | None:
            if pool is None or not pool.can_follow(rows_TW):
                return None
            return self._lending.take_now(pool, rows_TW.nbytes)

        early = EarlyWrite(take, self._lending.give_back)
        try:
            yield early
        finally:
            early.close()

    async def export(
        self,
        session_id: str,
        item_index: int,
        rows: RowSource,
        timings: ItemTimings,
        early: EarlyWrite | None = None,
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse | bytes]:
        """Ships one item's rows: yields one Ready, or serialized chunks.

        Args:
            rows: in the dtype that the peer knows of.
            early: may have them in the pool already.

        Raises:
            EncoderUnavailable: the session is not known (its Connect stream has ended).
            Overloaded: the pool stayed full.
            TransportUnavailable: the rows are larger than the pool and the peer takes nothing but leases.
        """
        start = time.perf_counter()
        session = self._sessions.get(session_id)
        if session_id and session is None:
            raise EncoderUnavailable(f"session {session_id} is not open: connect again")
        held = early.taken() if early is not None else None
        if held is None and session is not None:
            held = await self._write(session, rows)
        if held is not None:
            export_ms = (time.perf_counter() - start) * 1000
            yield self._leased(session_id, held, item_index, replace(timings, export_ms=export_ms))
        else:
            rows_TW = await asyncio.to_thread(rows.on_host)
            for chunk in self._chunks(item_index, rows_TW, timings):
                yield chunk

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Gives leases back; returns how many, and how many were not this session's."""
        return self._lending.release(session_id, lease_ids)

    def start_draining(self) -> None:
        """Tells every peer to send nothing new."""
        self._sessions.start_draining()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no lease is left; False if that took longer than `timeout_s` seconds."""
        return await self._lending.drained(timeout_s)

    def stats(self) -> ExporterStats:
        return ExporterStats(
            leases=replace(self._lending.leases.counts),
            live_leases=len(self._lending.leases),
            sessions=len(self._sessions),
            pool_nbytes={pool.transport: pool.nbytes for pool in self._pools},
            pool_used_nbytes={pool.transport: pool.used_nbytes for pool in self._pools},
            shipped_nbytes=dict(self._shipped_nbytes),
            oversize_items=self._num_oversize_items,
        )

    async def _write(self, session: Session, rows: RowSource) -> Held | None:
        """The rows in a block of the session's pool; None if they must go as bytes."""
        pool = session.pool
        if pool is None or not self._fits(rows.nbytes, pool, session.takes_bytes):
            return None
        held = await self._lending.take(pool, rows.nbytes)
        try:
            # Off the loop: 64 MiB take long enough to stall every other stream.
            await _uncancelled(asyncio.to_thread(pool.write, held.block, rows))
            if self._sessions.get(session.session_id) is None:
                raise EncoderUnavailable(f"session {session.session_id} has ended: connect again")
        except BaseException:
            self._lending.give_back(held)
            raise
        return held

    def _fits(self, nbytes: int, pool: ExportPool, takes_bytes: bool) -> bool:
        """Whether rows go by lease; larger ones than the pool could ever hold go as bytes, and are counted."""
        if pool.could_hold(nbytes):
            return True
        if not takes_bytes:
            raise TransportUnavailable(
                f"{nbytes} bytes of rows do not fit the {pool.transport} pool of {pool.nbytes}, and the peer takes "
                "nothing else: set --pool-bytes or --cuda-ipc-pool-bytes higher or let the worker use --transport auto"
            )
        self._num_oversize_items += 1
        return False

    def _leased(self, session_id: str, held: Held, item_index: int, timings: ItemTimings) -> encoder_pb2.EncodeResponse:
        block = held.block
        self._lending.lend(session_id, held)
        self._shipped_nbytes[held.pool.transport] += block.nbytes
        lease = encoder_pb2.Lease(
            lease_id=held.lease_id, generation=block.generation, offset=block.offset, nbytes=block.nbytes
        )
        return encoder_pb2.EncodeResponse(
            ready=encoder_pb2.Ready(item_index=item_index, lease=lease, timings=timings_to_proto(timings))
        )

    def _chunks(self, item_index: int, rows_TW: torch.Tensor, timings: ItemTimings) -> Iterator[bytes]:
        data = memoryview(rows_TW.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
        for start in range(0, data.nbytes, self._chunk_nbytes):
            part = data[start : start + self._chunk_nbytes]
            last = start + part.nbytes == data.nbytes
            yield encode_chunk(item_index, start, part, timings_to_proto(timings) if last else None)
            self._shipped_nbytes["grpc"] += part.nbytes


async def _uncancelled(work: Coroutine[Any, Any, object]) -> None:
    """Waits for `work` to its end even when cancelled: a block must not be freed while a thread still writes to it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:  # again and again, where several scopes give up
            cancelled = error
    if cancelled is not None:
        raise cancelled
