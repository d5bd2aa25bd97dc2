"""The shipping side of the transports: sessions, the exported pools with their leases, and rows as chunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedding_transport.chunk_codec import encode_chunk
from embedding_transport.cuda_ipc_pool import CudaIpcPool
from embedding_transport.early_write import EarlyWrite, Held
from embedding_transport.errors import BadRequest, EncoderUnavailable, Overloaded, TransportUnavailable
from embedding_transport.leases import LeaseCounts, LeaseTable
from embedding_transport.pool import Block, ExportPool
from embedding_transport.row_source import RowSource
from embedding_transport.shm_pool import ShmPool
from embedding_transport.types import PROTOCOL_VERSION, ItemTimings
from embedding_transport.wire import offer_to_proto, timings_to_proto
from protos.encoder.v1 import encoder_pb2

CHUNK_NBYTES = 1024 * 1024
_POOL_WAIT_S = 10.0
_EXPIRY_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Session:
    """What a peer has negotiated. pool: None where rows go as bytes; takes_bytes: those that do not fit it may, too."""

    pool: ExportPool | None
    takes_bytes: bool


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
        self._leases: LeaseTable[Held] = LeaseTable(lease_ttl_s, clock, self._take_back)
        self._block_freed = asyncio.Event()
        # Whoever waits for room is served in turn: small items must not starve a large one.
        self._turn = asyncio.Lock()
        self._sessions: dict[str, _Session] = {}
        self._num_oversize_items = 0
        self._draining = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None
        self.transports: tuple[str, ...] = (*(pool.transport for pool in pools), "grpc")
        self._shipped_nbytes = dict.fromkeys(self.transports, 0)

    def start(self) -> None:
        """Begins to expire leases; needs a running event loop."""
        self._expiry = asyncio.create_task(self._expire_leases())

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._expiry
        for pool in self._pools:
            pool.close()

    async def connect(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest]
    ) -> AsyncIterator[encoder_pb2.ConnectResponse]:
        """The whole Connect call. When it ends, for whatever reason, the session's leases are reclaimed.

        Raises:
            BadRequest: the peer does not follow the protocol.
            TransportUnavailable: no transport in common, or the peer's probe failed and it allows no other.
        """
        hello = await anext(requests, None)
        if hello is None or hello.WhichOneof("message") != "hello":
            raise BadRequest("Connect begins with hello")
        if hello.hello.protocol_version != PROTOCOL_VERSION:
            raise BadRequest(f"protocol version {hello.hello.protocol_version}: this service speaks {PROTOCOL_VERSION}")
        pool: ExportPool | None = None
        for offered in self._pools:
            if offered.transport in hello.hello.transports:
                yield encoder_pb2.ConnectResponse(offer=offer_to_proto(offered))
                answer = await anext(requests, None)
                if answer is None or answer.WhichOneof("message") != "probe_result":
                    raise BadRequest("an offer is answered with probe_result")
                if secrets.compare_digest(answer.probe_result.nonce, offered.nonce):
                    pool = offered
                    break
                reason = answer.probe_result.error or "wrong nonce"
                _log.warning("%s does not reach a peer: %s", offered.transport, reason)
        takes_bytes = "grpc" in hello.hello.transports
        if pool is None and not takes_bytes:
            raise TransportUnavailable(
                f"none of {list(hello.hello.transports)} reaches this service, which offers {list(self.transports)}"
            )
        transport = pool.transport if pool is not None else "grpc"
        session_id = secrets.token_hex(16)
        self._sessions[session_id] = _Session(pool, takes_bytes)
        try:
            yield encoder_pb2.ConnectResponse(
                session=encoder_pb2.Session(session_id=session_id, transport=transport, lease_ttl_s=self._leases.ttl_s)
            )
            async for response in self._hold(requests):
                yield response
        finally:
            del self._sessions[session_id]
            num_reclaimed = self._leases.reclaim(session_id)
            if num_reclaimed:
                _log.info("reclaimed %d leases of a peer that is gone", num_reclaimed)

    @contextlib.contextmanager
    def early_write(self, session_id: str) -> Iterator[EarlyWrite]:
        """For an item of this session whose rows are still to be made; to be handed to `export` with them."""
        session = self._sessions.get(session_id)
        pool = session.pool if session is not None else None

        def take(rows_TW: torch.Tensor) -> Held | None:
            # Whoever waits for room was there before.
            if pool is None or not pool.can_follow(rows_TW) or self._turn.locked():
                return None
            lease_id = self._leases.reserve_id()
            block = pool.allocate(rows_TW.nbytes, lease_id)
            return None if block is None else Held(pool, block, lease_id)

        early = EarlyWrite(take, self._take_back)
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
        pool = session.pool if session is not None else None
        held = early.taken() if early is not None else None
        if held is None and session is not None and pool is not None:
            held = await self._write(session_id, session, pool, rows)
        if held is not None:
            export_ms = (time.perf_counter() - start) * 1000
            yield self._leased(session_id, held, item_index, replace(timings, export_ms=export_ms))
        else:
            rows_TW = await asyncio.to_thread(rows.on_host)
            for chunk in self._chunks(item_index, rows_TW, timings):
                yield chunk

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Gives leases back; returns how many, and how many were not this session's."""
        return self._leases.release(session_id, lease_ids)

    def start_draining(self) -> None:
        """Tells every peer to send nothing new."""
        self._draining.set()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no lease is left; False if that took longer than `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._leases:
                    await self._next_free()
        except TimeoutError:
            return False
        return True

    def stats(self) -> ExporterStats:
        return ExporterStats(
            leases=replace(self._leases.counts),
            live_leases=len(self._leases),
            sessions=len(self._sessions),
            pool_nbytes={pool.transport: pool.nbytes for pool in self._pools},
            pool_used_nbytes={pool.transport: pool.used_nbytes for pool in self._pools},
            shipped_nbytes=dict(self._shipped_nbytes),
            oversize_items=self._num_oversize_items,
        )

    async def _hold(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest]
    ) -> AsyncIterator[encoder_pb2.ConnectResponse]:
        """Stays until the peer closes its side, passing on the news that this encoder is draining."""
        peer_gone = asyncio.ensure_future(anext(requests, None))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait([peer_gone, draining], return_when=asyncio.FIRST_COMPLETED)
            if not peer_gone.done():
                yield encoder_pb2.ConnectResponse(draining=encoder_pb2.Draining())
                await peer_gone
        finally:
            peer_gone.cancel()
            draining.cancel()

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

    async def _write(self, session_id: str, session: _Session, pool: ExportPool, rows: RowSource) -> Held | None:
        """The rows in a block of the pool; None if they must go as bytes."""
        if not self._fits(rows.nbytes, pool, session.takes_bytes):
            return None
        lease_id = self._leases.reserve_id()
        held = Held(pool, await self._allocate(pool, rows.nbytes, lease_id), lease_id)
        try:
            # Off the loop: 64 MiB take long enough to stall every other stream.
            await _uncancelled(asyncio.to_thread(pool.write, held.block, rows))
            if session_id not in self._sessions:
                raise EncoderUnavailable(f"session {session_id} has ended: connect again")
        except BaseException:
            self._take_back(held)
            raise
        return held

    def _leased(self, session_id: str, held: Held, item_index: int, timings: ItemTimings) -> encoder_pb2.EncodeResponse:
        block = held.block
        self._leases.grant(held.lease_id, session_id, held)
        self._shipped_nbytes[held.pool.transport] += block.nbytes
        lease = encoder_pb2.Lease(
            lease_id=held.lease_id, generation=block.generation, offset=block.offset, nbytes=block.nbytes
        )
        return encoder_pb2.EncodeResponse(
            ready=encoder_pb2.Ready(item_index=item_index, lease=lease, timings=timings_to_proto(timings))
        )

    async def _allocate(self, pool: ExportPool, nbytes: int, lease_id: int) -> Block:
        try:
            async with asyncio.timeout(_POOL_WAIT_S), self._turn:
                while (block := pool.allocate(nbytes, lease_id)) is None:
                    await self._next_free()
        except TimeoutError as error:
            raise Overloaded(
                f"no room for {nbytes} bytes of rows in the {pool.transport} pool within {_POOL_WAIT_S:g} s: "
                f"{pool.used_nbytes} of {pool.nbytes} bytes are leased; release faster or make the pool larger"
            ) from error
        return block

    def _chunks(self, item_index: int, rows_TW: torch.Tensor, timings: ItemTimings) -> Iterator[bytes]:
        data = memoryview(rows_TW.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
        for start in range(0, data.nbytes, self._chunk_nbytes):
            part = data[start : start + self._chunk_nbytes]
            last = start + part.nbytes == data.nbytes
            yield encode_chunk(item_index, start, part, timings_to_proto(timings) if last else None)
            self._shipped_nbytes["grpc"] += part.nbytes

    async def _next_free(self) -> None:
        self._block_freed.clear()
        await self._block_freed.wait()

    def _take_back(self, held: Held) -> None:
        held.pool.free(held.block)
        self._block_freed.set()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_INTERVAL_S, self._leases.ttl_s / 4))
            num_expired = self._leases.expire()
            if num_expired:
                _log.warning("%d leases expired: peers did not release them in time", num_expired)


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
