"""Blocks of the exported pools, lent to peers under leases; whoever waits for room in one is served in turn."""

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
class Held:
    """A block, the pool it is of, and the lease that its header names."""

    pool: ExportPool
    block: Block
    lease_id: int


class Lending:
    """Lives on one event loop.

    Args:
        pools: whose blocks are lent.
        lease_ttl_s: life of a lease that nobody releases, seconds.
        clock: seconds, monotonic.
    """

    def __init__(self, pools: Sequence[ExportPool], lease_ttl_s: float, clock: Callable[[], float]) -> None:
        self.leases: LeaseTable[Held] = LeaseTable(lease_ttl_s, clock, self.give_back)
        self._block_freed = asyncio.Event()
        # Small items must not starve a large one, nor a full pool those who want another.
        self._turns = {pool: asyncio.Lock() for pool in pools}
        self._expiry: asyncio.Task[None] | None = None

    def start(self, supervisor: Supervisor) -> None:
        """Begins to expire leases; the supervisor owns the loop that does."""
        self._supervisor = supervisor
        self._expiry = supervisor.start_task("lease expiry", self._expire_leases())

    async def close(self) -> None:
        if self._expiry is not None:
            await self._supervisor.stop(self._expiry)

    def take_now(self, pool: ExportPool, nbytes: int) -> Held | None:
        """A block if there is room for it and nobody waits; from any thread."""
        return None if self._turns[pool].locked() else self._take(pool, nbytes)

    async def take(self, pool: ExportPool, nbytes: int) -> Held:
        """A block, once there is room for it.

        Raises:
            Overloaded: the pool stayed full.
        """
        try:
            async with asyncio.timeout(_POOL_WAIT_S), self._turns[pool]:
                while (held := self._take(pool, nbytes)) is None:
                    await self._next_free()
        except TimeoutError as error:
            raise Overloaded(
                f"no room for {nbytes} bytes of rows in the {pool.transport} pool within {_POOL_WAIT_S:g} s: "
                f"{pool.used_nbytes} of {pool.nbytes} bytes are leased; release faster or make the pool larger"
            ) from error
        return held

    def give_back(self, held: Held) -> None:
        """Nobody reads the block any more."""
        held.pool.free(held.block)
        self._block_freed.set()

    def lend(self, session_id: str, held: Held) -> None:
        """The session may read the block until its lease ends, which gives it back."""
        self.leases.grant(held.lease_id, session_id, held)

    def release(self, session_id: str, lease_ids: Sequence[int]) -> tuple[int, int]:
        """Ends leases; returns how many, and how many were not this session's."""
        return self.leases.release(session_id, lease_ids)

    def reclaim(self, session_id: str) -> None:
        """Ends all leases of a session that is over."""
        num_reclaimed = self.leases.reclaim(session_id)
        if num_reclaimed:
            _log.info("reclaimed %d leases of a peer that is gone", num_reclaimed)

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no lease is left; False if that took longer than `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.leases:
                    await self._next_free()
        except TimeoutError:
            return False
        return True

    def _take(self, pool: ExportPool, nbytes: int) -> Held | None:
        lease_id = self.leases.reserve_id()
        block = pool.allocate(nbytes, lease_id)
        return None if block is None else Held(pool, block, lease_id)

    async def _next_free(self) -> None:
        self._block_freed.clear()
        await self._block_freed.wait()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_INTERVAL_S, self.leases.ttl_s / 4))
            num_expired = self.leases.expire()
            if num_expired:
                _log.warning("%d leases expired: peers did not release them in time", num_expired)
