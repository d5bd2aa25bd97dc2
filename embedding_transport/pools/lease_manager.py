"""Allocates blocks of the exported pools and leases them to peers; requests that wait for room are served in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitrine_vlm.embedding_transport.pools.leases import LeaseTable
from vitrine_vlm.embedding_transport.pools.pool import Block, ExportPool
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.supervisor import Supervisor

_POOL_WAIT_S = 10.0
_EXPIRY_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolBlock:
    """A block, the pool that it belongs to, and the id of the lease that its header names."""

    pool: ExportPool
    block: Block
    lease_id: int


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
        # Small items must not starve a large one, and a full pool must not delay allocations from another pool.
        self._locks = {pool: asyncio.Lock() for pool in pools}
        self._expiry: asyncio.Task[None] | None = None

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loop that expires leases; the supervisor owns it."""
        self._supervisor = supervisor
        self._expiry = supervisor.start_task("lease expiry", self._expire_leases())

    async def close(self) -> None:
        if self._expiry is not None:
            await self._supervisor.stop(self._expiry)

    def try_allocate(self, pool: ExportPool, nbytes: int) -> PoolBlock | None:
        """Returns a block, or None if there is no room or another allocation waits; callable from any thread."""
        return None if self._locks[pool].locked() else self._allocate(pool, nbytes)

    async def allocate(self, pool: ExportPool, nbytes: int) -> PoolBlock:
        """Returns a block as soon as there is room for it.

        Raises:
            Overloaded: the pool stayed full.
        """
        try:
            async with asyncio.timeout(_POOL_WAIT_S), self._locks[pool]:
                while (allocated := self._allocate(pool, nbytes)) is None:
                    await self._next_free()
        except TimeoutError as error:
            raise Overloaded(
                f"no room for {nbytes} bytes of rows in the {pool.transport} pool within {_POOL_WAIT_S:g} s: "
                f"{pool.used_nbytes} of {pool.nbytes} bytes are leased; release faster or make the pool larger"
            ) from error
        return allocated

    def release_block(self, allocated: PoolBlock) -> None:
        """Releases the block to its pool; no peer may read it any more."""
        allocated.pool.release(allocated.block)
        self._block_released.set()

    def grant(self, session_id: str, allocated: PoolBlock) -> None:
        """Grants the session a lease on the block; the end of the lease releases the block."""
        self.leases.grant(allocated.lease_id, session_id, allocated)

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Releases leases; returns how many, and how many ids were not leases of this session."""
        return self.leases.release(session_id, lease_ids)

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

    def _allocate(self, pool: ExportPool, nbytes: int) -> PoolBlock | None:
        lease_id = self.leases.reserve_id()
        block = pool.allocate(nbytes, lease_id)
        return None if block is None else PoolBlock(pool, block, lease_id)

    async def _next_free(self) -> None:
        self._block_released.clear()
        await self._block_released.wait()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_INTERVAL_S, self.leases.ttl_s / 4))
            num_expired = self.leases.expire()
            if num_expired:
                _log.warning("%d leases expired: peers did not release them in time", num_expired)
