"""The encoder's side of the transports: sessions, the exported pool with its leases, and rows as chunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedding_transport.chunk_codec import encode_chunk
from embedding_transport.errors import BadRequest, EncoderUnavailable, Overloaded, TransportUnavailable
from embedding_transport.leases import LeaseCounts, LeaseTable
from embedding_transport.shm_pool import PROBE_NBYTES, Block, ShmPool
from embedding_transport.types import PROTOCOL_VERSION, ItemTimings
from embedding_transport.wire import timings_to_proto
from protos.encoder.v1 import encoder_pb2

CHUNK_NBYTES = 1024 * 1024
_POOL_WAIT_S = 10.0
_EXPIRY_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Session:
    """What a peer has negotiated; `takes_bytes`: rows that do not fit the pool may come as bytes instead."""

    transport: str
    takes_bytes: bool


@dataclass(frozen=True)
class ExporterStats:
    """Snapshot for metrics: lease ends since the start, leases alive, pool use, bytes shipped by transport.

    oversize_items: sent as bytes over a shared-memory session, because they were larger than the whole pool.
    """

    leases: LeaseCounts
    live_leases: int
    sessions: int
    pool_nbytes: int
    pool_used_nbytes: int
    shipped_nbytes: dict[str, int]
    oversize_items: int


class RowExporter:
    """Ships rows by the transport that each peer has negotiated. One per encoder process; lives on one event loop.

    Args:
        shm_folder: shared-memory folder for the pool; None offers only "grpc".
        pool_bytes: size of the pool.
        lease_ttl_s: life of a lease that nobody releases, seconds.
        chunk_nbytes: bytes of rows in one message of the "grpc" transport.
        clock: seconds, monotonic.

    Raises:
        TransportUnavailable: the pool cannot be made.
    """

    def __init__(
        self,
        *,
        shm_folder: Path | None,
        pool_bytes: int,
        lease_ttl_s: float,
        chunk_nbytes: int = CHUNK_NBYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._pool = ShmPool(shm_folder, pool_bytes) if shm_folder is not None else None
        self._leases: LeaseTable[Block] = LeaseTable(lease_ttl_s, clock, self._take_back)
        self._block_freed = asyncio.Event()
        # Whoever waits for room is served in turn: small items must not starve a large one.
        self._turn = asyncio.Lock()
        self._sessions: dict[str, _Session] = {}
        self._num_oversize_items = 0
        self._draining = asyncio.Event()
        self._shipped_nbytes = {"shm": 0, "grpc": 0}
        self._expiry: asyncio.Task[None] | None = None
        self.transports: tuple[str, ...] = ("shm", "grpc") if self._pool is not None else ("grpc",)

    def start(self) -> None:
        """Begins to expire leases; needs a running event loop."""
        self._expiry = asyncio.create_task(self._expire_leases())

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._expiry
        if self._pool is not None:
            self._pool.close()

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
            raise BadRequest(f"protocol version {hello.hello.protocol_version}: this encoder speaks {PROTOCOL_VERSION}")
        wanted = [name for name in hello.hello.transports if name in self.transports]
        if "shm" in wanted:
            yield encoder_pb2.ConnectResponse(offer=self._shm_offer())
            answer = await anext(requests, None)
            if answer is None or answer.WhichOneof("message") != "probe_result":
                raise BadRequest("an offer is answered with probe_result")
            if not self._probe_succeeded(answer.probe_result):
                _log.warning("shared memory does not reach a peer: %s", answer.probe_result.error or "wrong nonce")
                wanted.remove("shm")
        if not wanted:
            raise TransportUnavailable(
                f"none of {list(hello.hello.transports)} reaches this encoder, which offers {list(self.transports)}"
            )
        transport = "shm" if "shm" in wanted else "grpc"
        session_id = secrets.token_hex(16)
        self._sessions[session_id] = _Session(transport, takes_bytes="grpc" in wanted)
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

    async def export(
        self, session_id: str, item_index: int, rows_TW: torch.Tensor, timings: ItemTimings
    ) -> AsyncIterator[encoder_pb2.EncodeResponse | bytes]:
        """Ships one item's rows: yields one Ready, or serialized chunks.

        Args:
            rows_TW: [num_tokens, row_width] in the identity's dtype, contiguous.

        Raises:
            EncoderUnavailable: the session is not known (its Connect stream has ended).
            Overloaded: the pool stayed full.
            TransportUnavailable: the rows are larger than the pool and the peer takes nothing but leases.
        """
        if session_id and session_id not in self._sessions:
            raise EncoderUnavailable(f"session {session_id} is not open: connect again")
        rows_TW = rows_TW.cpu().contiguous()
        session = self._sessions.get(session_id)
        if session is not None and session.transport == "shm" and self._fits(rows_TW.nbytes, session):
            yield await self._export_lease(session_id, item_index, rows_TW, timings)
        else:
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
            pool_nbytes=self._pool.nbytes if self._pool else 0,
            pool_used_nbytes=self._pool.used_nbytes if self._pool else 0,
            shipped_nbytes=dict(self._shipped_nbytes),
            oversize_items=self._num_oversize_items,
        )

    def _shm_offer(self) -> encoder_pb2.Offer:
        assert self._pool is not None
        shm = encoder_pb2.ShmPool(
            name=self._pool.name, nbytes=self._pool.file_nbytes, probe_offset=0, probe_nbytes=PROBE_NBYTES
        )
        return encoder_pb2.Offer(transport="shm", shm=shm)

    def _probe_succeeded(self, result: encoder_pb2.ProbeResult) -> bool:
        assert self._pool is not None
        return secrets.compare_digest(result.nonce, self._pool.nonce)

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

    def _fits(self, nbytes: int, session: _Session) -> bool:
        """Whether rows go by lease; larger ones than the pool could ever hold go as bytes, and are counted."""
        assert self._pool is not None
        if self._pool.could_hold(nbytes):
            return True
        if not session.takes_bytes:
            raise TransportUnavailable(
                f"{nbytes} bytes of rows do not fit the pool of {self._pool.nbytes}, and the peer takes nothing but "
                "shared memory: set --pool-bytes higher or let the worker use --transport auto"
            )
        self._num_oversize_items += 1
        return False

    async def _export_lease(
        self, session_id: str, item_index: int, rows_TW: torch.Tensor, timings: ItemTimings
    ) -> encoder_pb2.EncodeResponse:
        assert self._pool is not None
        start = time.perf_counter()
        lease_id = self._leases.reserve_id()
        block = await self._allocate(rows_TW.nbytes, lease_id)
        try:
            num_tokens, width = rows_TW.shape
            target_TW = self._pool.rows(block, (num_tokens, width), rows_TW.dtype)
            # Off the loop: 64 MiB take long enough to stall every other stream.
            await _uncancelled(asyncio.to_thread(target_TW.copy_, rows_TW))
            if session_id not in self._sessions:
                raise EncoderUnavailable(f"session {session_id} has ended: connect again")
        except BaseException:
            self._take_back(block)
            raise
        self._leases.grant(lease_id, session_id, block)
        self._shipped_nbytes["shm"] += block.nbytes
        timings = replace(timings, export_ms=(time.perf_counter() - start) * 1000)
        lease = encoder_pb2.Lease(
            lease_id=lease_id, generation=block.generation, offset=block.offset, nbytes=block.nbytes
        )
        return encoder_pb2.EncodeResponse(
            ready=encoder_pb2.Ready(item_index=item_index, lease=lease, timings=timings_to_proto(timings))
        )

    async def _allocate(self, nbytes: int, lease_id: int) -> Block:
        pool = self._pool
        assert pool is not None
        try:
            async with asyncio.timeout(_POOL_WAIT_S), self._turn:
                while (block := pool.allocate(nbytes, lease_id)) is None:
                    await self._next_free()
        except TimeoutError as error:
            raise Overloaded(
                f"no room for {nbytes} bytes of rows in the pool within {_POOL_WAIT_S:g} s: "
                f"{pool.used_nbytes} of {pool.nbytes} bytes are leased; release faster or set --pool-bytes higher"
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

    def _take_back(self, block: Block) -> None:
        assert self._pool is not None
        self._pool.free(block)
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
