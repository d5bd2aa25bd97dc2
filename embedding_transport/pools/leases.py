"""Leases: which session may read which exported block, and until when; the same for all pools."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

BlockT = TypeVar("BlockT")


@dataclass(frozen=True)
class Lease(Generic[BlockT]):
    """`lease_id` is never used twice in one process; `expires_at` is in seconds on the table's clock.

    call_id: the call of the session in which it was granted; 0 where the peer names no calls.
    """

    lease_id: int
    session_id: str
    block: BlockT
    expires_at: float
    call_id: int


@dataclass
class LeaseCounts:
    """Leases since the start: granted, and ended by release, by expiry, or by the end of their session (reclaimed).

    unknown: releases of leases that the session did not hold.
    """

    granted: int = 0
    released: int = 0
    expired: int = 0
    reclaimed: int = 0
    unknown: int = 0


class LeaseTable(Generic[BlockT]):
    """Grants leases and ends each exactly once: on release, on expiry, or when its session ends.

    Args:
        ttl_s: seconds after which a lease expires if its peer does not release it.
        clock: returns monotonic seconds.
        on_end: called with the block of every lease that ends.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float], on_end: Callable[[BlockT], None]) -> None:
        self.ttl_s = ttl_s
        self.counts = LeaseCounts()
        self._clock = clock
        self._on_end = on_end
        self._leases: dict[int, Lease[BlockT]] = {}
        self._lease_ids = itertools.count(1)

    def __len__(self) -> int:
        """The number of live leases."""
        return len(self._leases)

    def reserve_id(self) -> int:
        """Returns a new lease id, which the block's header names before `grant`; callable from any thread."""
        return next(self._lease_ids)

    def grant(self, lease_id: int, session_id: str, block: BlockT, call_id: int = 0) -> Lease[BlockT]:
        lease = Lease(lease_id, session_id, block, self._clock() + self.ttl_s, call_id)
        self._leases[lease_id] = lease
        self.counts.granted += 1
        return lease

    def release(self, session_id: str, lease_ids: Iterable[int]) -> tuple[int, int]:
        """Ends leases of this session; returns how many, and how many ids were not leases of this session."""
        num_released = num_unknown = 0
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None or lease.session_id != session_id:
                num_unknown += 1
            else:
                self._end(lease)
                num_released += 1
        self.counts.released += num_released
        self.counts.unknown += num_unknown
        return num_released, num_unknown

    def release_unread(self, session_id: str, read_lease_ids: Mapping[int, Collection[int]]) -> int:
        """Ends the leases of calls of this session that were not read to their end; returns how many.

        Args:
            read_lease_ids: by the id of each call; the leases that the peer has read, which go on.
        """
        num_released = self._end_all(
            lambda lease: (
                lease.session_id == session_id
                and lease.call_id in read_lease_ids
                and lease.lease_id not in read_lease_ids[lease.call_id]
            )
        )
        self.counts.released += num_released
        return num_released

    def release_session(self, session_id: str) -> int:
        """Ends all leases of a session that has ended; returns how many."""
        num_ended = self._end_all(lambda lease: lease.session_id == session_id)
        self.counts.reclaimed += num_ended
        return num_ended

    def expire(self) -> int:
        """Ends all leases whose time is over; returns how many."""
        now = self._clock()
        num_ended = self._end_all(lambda lease: lease.expires_at <= now)
        self.counts.expired += num_ended
        return num_ended

    def _end_all(self, which: Callable[[Lease[BlockT]], bool]) -> int:
        ending = [lease for lease in self._leases.values() if which(lease)]
        for lease in ending:
            self._end(lease)
        return len(ending)

    def _end(self, lease: Lease[BlockT]) -> None:
        del self._leases[lease.lease_id]
        self._on_end(lease.block)
