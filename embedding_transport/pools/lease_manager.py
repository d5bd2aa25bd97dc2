"""Allocates blocks of the exported pools and leases them to peers.

Allocations that wait for room are served in order, those of a session above its share of the pool (`fair_share.py`)
behind the others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from vitrine_vlm.embedding_transport.pools.fair_share import FairShares, Holder
from vitrine_vlm.embedding_transport.pools.leases import LeaseTable
from vitrine_vlm.embedding_transport.pools.pool import Block, ExportPool
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.supervisor import Supervisor

_POOL_WAIT_S = 10.0
# After which rows go as bytes where the room is taken by the leases of other sessions.
_CROWDED_WAIT_S = 0.1
_EXPIRY_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolBlock:
    """A block, the pool that it belongs to, the id of the lease that its header names, and the session it is for."""

    pool: ExportPool
    block: Block
    lease_id: int
    holder: Holder


@dataclass(eq=False)
class _Waiter:
    """An allocation that waits for room."""

    holder: Holder
    nbytes: int
    allocated: asyncio.Future[PoolBlock]


@dataclass
class _PoolState:
    """Who holds blocks of a pool, and who waits for one, in the order of their coming."""

    shares: FairShares = field(default_factory=FairShares)
    waiting: list[_Waiter] = field(default_factory=list)


class LeaseManager:
    """All blocks and leases of one process. It belongs to one event loop.

    Args:
        pools: the pools to allocate from.
        lease_ttl_s: seconds after which a lease expires if its peer does not release it.
        clock: returns monotonic seconds.
    """

    def __init__(self, pools: Sequence[ExportPool], lease_ttl_s: float, clock: Callable[[], float]) -> None:
        self.leases: LeaseTable[PoolBlock] = LeaseTable(lease_ttl_s, clock, self.release_block)
        self._block_released = asyncio.Event()
        self._pools = {pool: _PoolState() for pool in pools}
        self._lock = threading.Lock()  # of these states, which batches change, too
        self._expiry: asyncio.Task[None] | None = None

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loop that expires leases; the supervisor owns it."""
        self._supervisor = supervisor
        self._expiry = supervisor.start_task("lease expiry", self._expire_leases())

    async def close(self) -> None:
        if self._expiry is not None:
            await self._supervisor.stop(self._expiry)

    def open_session(self, pool: ExportPool, holder: Holder) -> None:
        """Counts the session among those that share the pool."""
        with self._lock:
            self._pools[pool].shares.join(holder)

    def close_session(self, pool: ExportPool, holder: Holder) -> None:
        """Ends `open_session`: the others may hold more from now on."""
        with self._lock:
            self._pools[pool].shares.leave(holder)
        self._serve(pool)

    def try_allocate(self, pool: ExportPool, nbytes: int, holder: Holder) -> PoolBlock | None:
        """Returns a block, or None if there is no room within the holder's share, or another allocation comes first.

        Callable from any thread.
        """
        with self._lock:
            state, free_nbytes = self._pools[pool], pool.free_nbytes
            if not state.shares.may_hold(holder, nbytes, free_nbytes):
                return None
            if any(state.shares.may_hold(each.holder, each.nbytes, free_nbytes) for each in state.waiting):
                return None
            return self._allocate(pool, nbytes, holder)

    async def allocate(
        self, pool: ExportPool, nbytes: int, holder: Holder, accepts_bytes: bool = False
    ) -> PoolBlock | None:
        """Returns a block as soon as there is room for it.

        Args:
            accepts_bytes: whether to return None where leases of other sessions leave no room to one within its share.

        Raises:
            Overloaded: the pool stayed full.
        """
        at_once = self.try_allocate(pool, nbytes, holder)
        if at_once is not None:
            return at_once
        waiter = _Waiter(holder, nbytes, asyncio.get_running_loop().create_future())
        with self._lock:
            self._pools[pool].waiting.append(waiter)
        self._serve(pool)
        if waiter.allocated.done():
            return waiter.allocated.result()
        try:
            await asyncio.wait([waiter.allocated], timeout=min(_CROWDED_WAIT_S, _POOL_WAIT_S))
            if accepts_bytes and self._is_crowded(pool, waiter):
                return None
            await asyncio.wait([waiter.allocated], timeout=_POOL_WAIT_S - _CROWDED_WAIT_S)
            if waiter.allocated.done():
                return waiter.allocated.result()
        except asyncio.CancelledError:
            if waiter.allocated.done():
                self.release_block(waiter.allocated.result())
            raise
        finally:
            if not waiter.allocated.done():
                with self._lock:
                    self._pools[pool].waiting.remove(waiter)
                self._serve(pool)  # those that came later may fit
        raise Overloaded(
            f"no room for {nbytes} bytes of rows in the {pool.transport} pool within {_POOL_WAIT_S:g} s: "
            f"{pool.used_nbytes} of {pool.nbytes} bytes are leased; release faster or make the pool larger",
            retry_after_s=_POOL_WAIT_S,
        )

    def release_block(self, allocated: PoolBlock) -> None:
        """Releases the block to its pool; no peer may read it any more."""
        with self._lock:
            allocated.pool.release(allocated.block)
            self._pools[allocated.pool].shares.remove(allocated.holder, allocated.block.nbytes)
        self._block_released.set()
        self._serve(allocated.pool)

    def grant(self, session_id: str, allocated: PoolBlock, call_id: int = 0) -> None:
        """Grants the session a lease on the block; the end of the lease releases the block."""
        self.leases.grant(allocated.lease_id, session_id, allocated, call_id)

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Releases leases; returns how many, and how many ids were not leases of this session."""
        return self.leases.release(session_id, lease_ids)

    def release_unread(self, session_id: str, read_lease_ids: Mapping[int, Collection[int]]) -> int:
        """See `LeaseTable.release_unread`."""
        return self.leases.release_unread(session_id, read_lease_ids)

    def release_session(self, session_id: str) -> None:
        """Releases all leases of a session that has ended."""
        num_reclaimed = self.leases.release_session(session_id)
        if num_reclaimed:
            _log.info("reclaimed %d leases of a peer that is gone", num_reclaimed)

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no lease is left; returns False after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.leases:
                    await self._next_free()
        except TimeoutError:
            return False
        return True

    def _serve(self, pool: ExportPool) -> None:
        """Gives the waiting allocations their blocks: the first of those within their share, until one does not fit."""
        with self._lock:
            state = self._pools[pool]
            for waiter in list(state.waiting):
                if not state.shares.may_hold(waiter.holder, waiter.nbytes, pool.free_nbytes):
                    continue
                allocated = self._allocate(pool, waiter.nbytes, waiter.holder)
                if allocated is None:
                    return  # small items must not starve a large one
                state.waiting.remove(waiter)
                waiter.allocated.set_result(allocated)

    def _is_crowded(self, pool: ExportPool, waiter: _Waiter) -> bool:
        """Whether it still waits, although within its share, while other sessions are connected."""
        if waiter.allocated.done():
            return False
        with self._lock:
            shares = self._pools[pool].shares
            return shares.has_several and shares.may_hold(waiter.holder, waiter.nbytes, pool.free_nbytes)

    def _allocate(self, pool: ExportPool, nbytes: int, holder: Holder) -> PoolBlock | None:
        lease_id = self.leases.reserve_id()
        block = pool.allocate(nbytes, lease_id)
        if block is None:
            return None
        self._pools[pool].shares.add(holder, nbytes)
        return PoolBlock(pool, block, lease_id, holder)

    async def _next_free(self) -> None:
        self._block_released.clear()
        await self._block_released.wait()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_INTERVAL_S, self.leases.ttl_s / 4))
            num_expired = self.leases.expire()
            if num_expired:
                _log.warning("%d leases expired: peers did not release them in time", num_expired)
