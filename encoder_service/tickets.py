"""Tickets: items whose layout was sent and whose bytes stay in memory, so that their rows can be claimed later.

    issue [-> computed ahead] -> any number of claims and renewals -> release, or the end of its time to live

A ticket is known by 16 random bytes, which only its tenant can claim. What it holds counts against the budget of media
bytes until the ticket and all claims in flight have ended. The tickets of one peer, and those of one tenant, hold a
share of that budget at most (`fair_share.py`), so that a part of it is left for others.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from vitrine_vlm.embedding_transport.pools.fair_share import is_within_share
from vitrine_vlm.encoder_service.engine.compute_ahead import AheadStats, Compute, ComputeAhead
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia
from vitrine_vlm.errors import Overloaded, TicketExpired
from vitrine_vlm.service_runtime.byte_budget import ReservedBytes
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ItemTimings, Layout, Ticket

_TICKET_NBYTES = 16
# What is kept of an item besides its file, and of each time of a video: many small files take no more than is counted.
_LEAST_HELD_NBYTES, _HELD_NBYTES_OF_TIME = 4096, 128
_EXPIRY_INTERVAL_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedItem:
    """An item whose bytes are in memory and whose size is known.

    layout: with the content hash.
    reserved: its bytes; the user of this item releases them.
    timings: how long loading and opening it took; zeros where a ticket was claimed.
    """

    opened: OpenedMedia
    layout: Layout
    reserved: ReservedBytes
    timings: ItemTimings = field(default_factory=ItemTimings)


@dataclass(frozen=True)
class _Issued:
    item: OpenedItem
    peer: str
    tenant: str
    expires_at: float


class TicketTable:
    """The live tickets of one process. It belongs to one event loop.

    encoder_id: names this process in tickets.
    ttl_s: seconds for which a ticket can be claimed, from its issue or last renewal.
    nbytes: bytes of media that live tickets hold.
    """

    def __init__(
        self, encoder_id: str, ttl_s: float, clock: Callable[[], float] = time.monotonic, max_ahead: int = 0
    ) -> None:
        """
        Args:
            clock: returns monotonic seconds.
            max_ahead: tickets whose rows are computed, or being computed, before any claim.
        """
        self.encoder_id = encoder_id
        self.ttl_s = ttl_s
        self.nbytes = 0
        self._clock = clock
        self._held_by_peer: Counter[str] = Counter()
        self._held_by_tenant: Counter[str] = Counter()
        # In the order of their issue or last renewal, which is that of their expiry.
        self._issued: dict[bytes, _Issued] = {}
        self._ahead = ComputeAhead(max_ahead)
        self._expiry: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """The number of live tickets."""
        return len(self._issued)

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loop that expires tickets, and to compute ahead; the supervisor owns both."""
        self._supervisor = supervisor
        self._expiry = supervisor.start_task("ticket expiry", self._expire_tickets())
        self._ahead.start(supervisor)

    async def close(self) -> None:
        if self._expiry is not None:
            await self._supervisor.stop(self._expiry)
        await self._ahead.close()

    @property
    def ahead(self) -> AheadStats:
        """What became of tickets whose rows were computed ahead."""
        return self._ahead.stats

    def issue(self, item: OpenedItem, tenant: str, peer: str = "") -> Ticket:
        """A new ticket for an item, which keeps the item's bytes reserved, too.

        Args:
            peer: the name of the peer that asks for it.

        Raises:
            Overloaded: the tickets of this peer or tenant hold their share already, or all do.
        """
        least_nbytes = _LEAST_HELD_NBYTES + _HELD_NBYTES_OF_TIME * len(item.layout.timestamps_s)
        item.reserved.reserve(max(0, least_nbytes - item.reserved.nbytes))
        self._check_share(item.reserved, f"peer {peer!r}", self._held_by_peer[peer])
        self._check_share(item.reserved, f"tenant {tenant!r}", self._held_by_tenant[tenant])
        item.reserved.share()
        self._count(peer, tenant, item.reserved.nbytes)
        ticket = Ticket(self.encoder_id, secrets.token_bytes(_TICKET_NBYTES))
        expires_at = self._clock() + self.ttl_s
        self._issued[ticket.value] = _Issued(replace(item, timings=ItemTimings()), peer, tenant, expires_at)
        return ticket

    def compute_ahead(self, ticket: Ticket, compute: Compute) -> None:
        """Has the rows of a ticket computed before they are claimed, see `ComputeAhead.add`."""
        self._issued[ticket.value].item.reserved.on_free = partial(self._ahead.abandoned, ticket.value)
        self._ahead.add(ticket.value, compute)

    def opened(self, ticket: bytes, tenant: str) -> OpenedItem:
        """The item of a ticket; the caller is one more user of its bytes.

        Raises:
            TicketExpired: this process has no such ticket of this tenant, or has it no longer.
        """
        issued = self._issued.get(ticket)
        if issued is None or issued.tenant != tenant or issued.expires_at <= self._clock():
            raise TicketExpired(
                f"ticket {ticket[:_TICKET_NBYTES].hex()} is not known to this encoder: it was released, is older than "
                f"{self.ttl_s:g} s (--ticket-ttl-s), or is another encoder's or tenant's; ask for the layout again"
            )
        issued.item.reserved.share()
        return issued.item

    def renew(self, ticket: bytes) -> None:
        """Begins the time to live of a live ticket again."""
        issued = self._issued.pop(ticket, None)
        if issued is not None:
            self._issued[ticket] = replace(issued, expires_at=self._clock() + self.ttl_s)

    def claim_rows(self, ticket: bytes) -> None:
        """Leaves the place of a ticket whose rows were to be computed ahead to another one: its user asks for them."""
        self._ahead.claimed(ticket)

    def release(self, tickets: Iterable[bytes]) -> None:
        """Ends tickets; unknown ones are ignored, and claims in flight go on."""
        for ticket in tickets:
            issued = self._issued.pop(ticket, None)
            if issued is not None:
                self._count(issued.peer, issued.tenant, -issued.item.reserved.nbytes)
                issued.item.reserved.release()
                self._ahead.ended(ticket)

    def expire(self) -> int:
        """Ends all tickets whose time is over; returns how many."""
        now, over = self._clock(), []
        for ticket, issued in self._issued.items():
            if issued.expires_at > now:
                break
            over.append(ticket)
        self.release(over)
        return len(over)

    def _check_share(self, reserved: ReservedBytes, holder: str, held_nbytes: int) -> None:
        # The item's own bytes are reserved already.
        if not is_within_share(held_nbytes, reserved.nbytes, reserved.left_nbytes + reserved.nbytes):
            # Without a time: its tickets end when it releases them, and only the last of them by their own time.
            raise Overloaded(
                f"tickets of {holder} hold {held_nbytes} bytes of media, and {reserved.left_nbytes} are left for all: "
                "release them sooner, add encoders or raise --max-held-bytes"
            )

    def _count(self, peer: str, tenant: str, nbytes: int) -> None:
        self.nbytes += nbytes
        for held, name in ((self._held_by_peer, peer), (self._held_by_tenant, tenant)):
            held[name] += nbytes
            if not held[name]:
                del held[name]

    async def _expire_tickets(self) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRY_INTERVAL_S, self.ttl_s / 4))
            num_expired = self.expire()
            if num_expired:
                _log.info("%d tickets expired: they were not released in time", num_expired)
