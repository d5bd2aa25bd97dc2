"""The shipping side of the transports: rows of an item are written to a pool under a lease, or sent as chunks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcPool
from vitrine_vlm.embedding_transport.pools.lease_manager import LeaseManager, PoolBlock
from vitrine_vlm.embedding_transport.pools.leases import LeaseCounts
from vitrine_vlm.embedding_transport.pools.pool import ExportPool
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.async_pool_write import AsyncPoolWrite
from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules
from vitrine_vlm.embedding_transport.shipping.sessions import Session, Sessions
from vitrine_vlm.embedding_transport.wire.chunk_codec import encode_chunk
from vitrine_vlm.embedding_transport.wire.messages import timings_to_proto
from vitrine_vlm.errors import EncoderUnavailable, InternalError, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.peers import Peer
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ItemTimings

CHUNK_NBYTES = 1024 * 1024
_ALL_ALLOWED = PeerRules()


@dataclass(frozen=True)
class ExporterStats:
    """A snapshot for metrics.

    leases: counts since the start; live_leases: the leases that peers hold now.
    pool_nbytes, pool_used_nbytes, shipped_nbytes: by transport.
    oversize_items: items sent as bytes to a peer with a pool, because they were larger than the whole pool.
    crowded_items: likewise, because the leases of other peers left no room.
    """

    leases: LeaseCounts
    live_leases: int
    sessions: int
    pool_nbytes: dict[str, int]
    pool_used_nbytes: dict[str, int]
    shipped_nbytes: dict[str, int]
    oversize_items: int
    crowded_items: int


def export_pools(
    device: torch.device, cuda_ipc_nbytes: int, shm_folder: Path | None, shm_nbytes: int
) -> list[ExportPool]:
    """Creates the pools that peers on this host can map, best first.

    Args:
        device: the device on which rows are computed.
        cuda_ipc_nbytes: the size of a pool in that GPU's memory; 0 for no such pool.
        shm_folder: the folder of a pool in shared memory; None for no such pool.
        shm_nbytes: the size of that pool.

    Raises:
        TransportUnavailable: there is no room for one of them.
    """
    pools: list[ExportPool] = []
    if device.type == "cuda" and cuda_ipc_nbytes:
        pools.append(CudaIpcPool(device, cuda_ipc_nbytes))
    if shm_folder is not None:
        pools.append(ShmPool(shm_folder, shm_nbytes))
    return pools


class RowExporter:
    """Ships rows by the transport that each peer has negotiated. A process has one, on one event loop.

    Args:
        pools: the pools to offer, best first; without any, rows are sent as bytes ("grpc").
        lease_ttl_s: seconds after which a lease expires if its peer does not release it.
        chunk_nbytes: bytes of rows in one message of the "grpc" transport.
        rules: what peers may do.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        pools: Sequence[ExportPool],
        *,
        lease_ttl_s: float,
        chunk_nbytes: int = CHUNK_NBYTES,
        rules: PeerRules = _ALL_ALLOWED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._pools = list(pools)
        self._leases = LeaseManager(self._pools, lease_ttl_s, clock)
        self._sessions = Sessions(self._pools, lease_ttl_s, rules, self._session_begun, self._session_ended)
        self._num_oversize_items = self._num_crowded_items = 0
        self.transports = self._sessions.transports
        self._shipped_nbytes = dict.fromkeys(self.transports, 0)

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loop that expires leases; the supervisor owns it."""
        self._leases.start(supervisor)

    async def close(self) -> None:
        """Ends all sessions, and closes the pools."""
        await self._sessions.close()
        await self._leases.close()
        for pool in self._pools:
            pool.close()

    def connect(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest], peer: Peer
    ) -> AsyncGenerator[encoder_pb2.ConnectResponse]:
        """Serves one Connect call, see `Sessions.connect`. The leases of the session are released when it ends."""
        return self._sessions.connect(requests, peer)

    @contextlib.contextmanager
    def async_pool_write(self, session_id: str) -> Iterator[AsyncPoolWrite]:
        """Opens a write for an item of this session before its rows are computed; pass it to `export` with the rows."""
        session = self._sessions.get(session_id)
        pool = session.pool if session is not None else None

        def allocate(rows_TW: torch.Tensor) -> PoolBlock | None:
            if pool is None or not pool.supports_device(rows_TW.device):
                return None
            assert session is not None
            return self._leases.try_allocate(pool, rows_TW.nbytes, session.holder)

        pool_write = AsyncPoolWrite(allocate, self._leases.release_block)
        try:
            yield pool_write
        finally:
            pool_write.close()

    async def export(
        self,
        session_id: str,
        item_index: int,
        rows: RowSource,
        timings: ItemTimings,
        pool_write: AsyncPoolWrite | None = None,
        call_id: int = 0,
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse | bytes]:
        """Ships one item's rows: yields one Ready, or serialized chunks.

        Args:
            rows: in the dtype that Describe states.
            pool_write: may have written the rows to the pool already.
            call_id: by which the peer releases what it does not read, see `release_unread`; 0 for none.

        Raises:
            EncoderUnavailable: the session is unknown (its Connect stream has ended).
            InternalError: there are no rows, which neither a lease nor chunks can ship.
            Overloaded: the pool stayed full.
            TransportUnavailable: the rows are larger than the pool, and the peer does not accept bytes.
        """
        start = time.perf_counter()
        if not rows.nbytes:
            raise InternalError(f"item {item_index} has no rows")
        session = self._sessions.get(session_id)
        if session_id and session is None:
            raise EncoderUnavailable(f"session {session_id} is not open: connect again")
        allocated = pool_write.pop_block() if pool_write is not None else None
        if allocated is None and session is not None:
            allocated = await self._write(session, rows)
        if allocated is not None:
            export_ms = (time.perf_counter() - start) * 1000
            self._leases.grant(session_id, allocated, call_id)
            yield self._leased(allocated, item_index, replace(timings, export_ms=export_ms))
        else:
            rows_TW = await asyncio.to_thread(rows.on_host)
            for chunk in self._chunks(item_index, rows_TW, timings):
                yield chunk

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Releases leases; returns how many, and how many ids were not leases of this session."""
        return self._leases.release(session_id, lease_ids)

    def release_unread(self, session_id: str, read_lease_ids: Mapping[int, Collection[int]]) -> int:
        """Releases the leases of calls that were not read to their end, except those that were read; returns how many.

        Args:
            read_lease_ids: by the id of each call.
        """
        return self._leases.release_unread(session_id, read_lease_ids)

    def sends_bytes(self, session_id: str, nbytes: int) -> bool:
        """Whether `export` sends so many bytes of rows over gRPC: without a session, or where its pool is too small."""
        session = self._sessions.get(session_id)
        return session is None or session.pool is None or not session.pool.could_hold(nbytes)

    def start_draining(self) -> None:
        """Notifies all peers that they must send no new requests, and refuses new sessions."""
        self._sessions.start_draining()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no lease is left; returns False after `timeout_s` seconds."""
        return await self._leases.drained(timeout_s)

    def stats(self) -> ExporterStats:
        return ExporterStats(
            leases=replace(self._leases.leases.counts),
            live_leases=len(self._leases.leases),
            sessions=len(self._sessions),
            pool_nbytes={pool.transport: pool.nbytes for pool in self._pools},
            pool_used_nbytes={pool.transport: pool.used_nbytes for pool in self._pools},
            shipped_nbytes=dict(self._shipped_nbytes),
            oversize_items=self._num_oversize_items,
            crowded_items=self._num_crowded_items,
        )

    def _session_begun(self, session: Session) -> None:
        if session.pool is not None:
            self._leases.open_session(session.pool, session.holder)

    def _session_ended(self, session: Session) -> None:
        self._leases.release_session(session.session_id)
        if session.pool is not None:
            self._leases.close_session(session.pool, session.holder)

    async def _write(self, session: Session, rows: RowSource) -> PoolBlock | None:
        """Writes the rows to a block of the session's pool; returns None if they must be sent as bytes."""
        pool = session.pool
        if pool is None or not self._fits(rows.nbytes, pool, session.accepts_bytes):
            return None
        allocated = await self._leases.allocate(pool, rows.nbytes, session.holder, session.accepts_bytes)
        if allocated is None:
            self._num_crowded_items += 1
            return None
        try:
            # In a thread: a copy of 64 MiB takes long enough to stall every other stream.
            await _uncancelled(asyncio.to_thread(pool.write, allocated.block, rows))
            if self._sessions.get(session.session_id) is None:
                raise EncoderUnavailable(f"session {session.session_id} has ended: connect again")
        except BaseException:
            self._leases.release_block(allocated)
            raise
        return allocated

    def _fits(self, nbytes: int, pool: ExportPool, accepts_bytes: bool) -> bool:
        """Whether the rows fit the pool. Rows that never fit are counted and sent as bytes."""
        if pool.could_hold(nbytes):
            return True
        if not accepts_bytes:
            raise TransportUnavailable(
                f"{nbytes} bytes of rows do not fit the {pool.transport} pool of {pool.nbytes}, and the peer "
                "accepts no other transport: raise --pool-bytes or --cuda-ipc-pool-bytes, or set --transport auto there"
            )
        self._num_oversize_items += 1
        return False

    def _leased(self, allocated: PoolBlock, item_index: int, timings: ItemTimings) -> encoder_pb2.EncodeResponse:
        block = allocated.block
        self._shipped_nbytes[allocated.pool.transport] += block.nbytes
        lease = encoder_pb2.Lease(
            lease_id=allocated.lease_id, generation=block.generation, offset=block.offset, nbytes=block.nbytes
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
    """Waits until `work` ends even if cancelled: a block must not be released while a thread still writes to it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:  # may happen several times, if several scopes cancel
            cancelled = error
    if cancelled is not None:
        raise cancelled
