"""Shares of a pool: simulated over many sessions, and with real pools and allocations that wait."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitrine_vlm.embedding_transport.pools import lease_manager
from vitrine_vlm.embedding_transport.pools.fair_share import FairShares, Holder
from vitrine_vlm.embedding_transport.pools.lease_manager import LeaseManager, PoolBlock
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.errors import Overloaded

POOL = 900


class SimulatedPool:
    """Bytes without places: what of `FairShares` decides."""

    def __init__(self, *holders: Holder) -> None:
        self.shares = FairShares()
        self.free = POOL
        self.held = dict.fromkeys(holders, 0)
        for holder in holders:
            self.shares.join(holder)

    def allocate(self, holder: Holder, nbytes: int) -> bool:
        if nbytes > self.free or not self.shares.may_hold(holder, nbytes, self.free):
            return False
        self.shares.add(holder, nbytes)
        self.free -= nbytes
        self.held[holder] += nbytes
        return True

    def release(self, holder: Holder, nbytes: int) -> None:
        self.shares.remove(holder, nbytes)
        self.free += nbytes
        self.held[holder] -= nbytes

    def fill(self, holder: Holder, nbytes: int = 1) -> int:
        while self.allocate(holder, nbytes):
            pass
        return self.held[holder]


def peers(number: int) -> list[Holder]:
    return [Holder(f"peer {index}", f"session {index}") for index in range(number)]


def test_a_single_session_has_the_whole_pool() -> None:
    (alone,) = peers(1)
    assert SimulatedPool(alone).fill(alone) == POOL


def test_a_third_is_left_for_one_that_comes_later() -> None:
    hoarder, victim = peers(2)
    pool = SimulatedPool(hoarder, victim)
    assert pool.fill(hoarder) == POOL * 2 // 3
    assert pool.fill(victim) == POOL * 2 // 9
    pool.release(hoarder, pool.held[hoarder] - POOL * 2 // 5)
    assert pool.fill(victim) == POOL * 2 // 5 == pool.fill(hoarder), "two busy ones end at equal shares"


def test_many_sessions_of_one_peer_share_its_share() -> None:
    *hoarding, victim = [Holder("hoarder", f"session {index}") for index in range(64)] + peers(1)
    pool = SimulatedPool(*hoarding, victim)
    for holder in hoarding:
        pool.fill(holder)
    assert sum(pool.held[holder] for holder in hoarding) <= POOL * 2 // 3
    assert pool.fill(victim) >= POOL * 2 // 10


def test_what_has_left_no_longer_counts() -> None:
    first, second = peers(2)
    pool = SimulatedPool(first, second)
    pool.fill(second)
    pool.shares.leave(second)
    assert pool.fill(first) == POOL - pool.held[second], "alone again"
    pool.release(second, pool.held[second])
    pool.release(first, pool.held[first])
    assert not (pool.shares._held_by_peer or pool.shares._held_by_session)


def test_none_starves_and_none_waits_for_what_never_comes() -> None:
    """Random loads: all items get through, as long as what is held is released at some time."""
    for seed in range(20):
        source = random.Random(seed)
        holders = [Holder(f"peer {source.randrange(3)}", f"session {index}") for index in range(6)]
        pool = SimulatedPool(*holders)
        waiting = [(holder, source.randrange(1, POOL)) for holder in holders for _ in range(20)]
        source.shuffle(waiting)
        held: list[tuple[Holder, int]] = []
        for _ in range(10_000):
            allocated = next((item for item in waiting if pool.allocate(*item)), None)
            if allocated is not None:
                waiting.remove(allocated)
                held.append(allocated)
            elif held:
                pool.release(*held.pop(source.randrange(len(held))))
            if not waiting:
                break
        assert not waiting


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ShmPool]:
    pool = ShmPool(tmp_path, 64 << 10)
    yield pool
    pool.close()


def shared_by(pool: ShmPool, *holders: Holder) -> LeaseManager:
    manager = LeaseManager([pool], lease_ttl_s=30, clock=time.monotonic)
    for holder in holders:
        manager.open_session(pool, holder)
    return manager


def fill(manager: LeaseManager, pool: ShmPool, holder: Holder, nbytes: int = 1024) -> list[PoolBlock]:
    blocks = []
    while (block := manager.try_allocate(pool, nbytes, holder)) is not None:
        blocks.append(block)
    return blocks


async def test_those_within_their_share_go_first(pool: ShmPool) -> None:
    hoarder, victim = peers(2)
    manager = shared_by(pool, hoarder, victim)
    held = fill(manager, pool, hoarder)
    assert len(held) * 1024 <= pool.nbytes * 2 // 3
    waiting = [asyncio.create_task(manager.allocate(pool, 1024, hoarder)) for _ in range(50)]
    await asyncio.sleep(0)
    before = time.monotonic()
    mine = [await manager.allocate(pool, 1024, victim) for _ in range(10)]
    assert time.monotonic() - before < 0.1 and all(mine), "it waits for none of those that came first"
    assert not any(task.done() for task in waiting)
    for block in held:
        manager.release_block(block)
    done, _ = await asyncio.wait(waiting, timeout=1)
    for task in done:
        if (allocated := task.result()) is not None:
            manager.release_block(allocated)
    assert len(done) > 20
    manager.close_session(pool, victim)  # it has ended: the others may have all
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


async def test_one_that_finds_no_room_gets_bytes_where_it_takes_them(
    pool: ShmPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_manager, "_POOL_WAIT_S", 0.3)
    hoarder, victim = peers(2)
    manager = shared_by(pool, hoarder)
    held = fill(manager, pool, hoarder)  # it was alone
    assert len(held) == pool.nbytes // 1088
    manager.open_session(pool, victim)
    before = time.monotonic()
    assert await manager.allocate(pool, 1024, victim, accepts_bytes=True) is None
    assert time.monotonic() - before < 0.25
    for holder, accepts_bytes in ((victim, False), (hoarder, True)):
        with pytest.raises(Overloaded, match="no room"):
            await manager.allocate(pool, 1024, holder, accepts_bytes)
    assert not manager._pools[pool].waiting


async def test_a_cancelled_allocation_leaves_nothing(pool: ShmPool) -> None:
    (alone,) = peers(1)
    manager = shared_by(pool, alone)
    held = fill(manager, pool, alone)
    large = asyncio.create_task(manager.allocate(pool, 32 << 10, alone))
    small = asyncio.create_task(manager.allocate(pool, 1024, alone))
    await asyncio.sleep(0)
    manager.release_block(held.pop())
    await asyncio.sleep(0.01)
    assert not small.done(), "the large one came first"
    large.cancel()
    block = await asyncio.wait_for(small, 1)
    assert block is not None
    both = asyncio.create_task(manager.allocate(pool, 1024, alone))
    await asyncio.sleep(0)
    manager.release_block(block)  # it has its block now, and is cancelled before it runs
    both.cancel()
    await asyncio.gather(both, large, return_exceptions=True)
    for each in held:
        manager.release_block(each)
    assert pool.used_nbytes == 0
