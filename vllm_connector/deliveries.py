"""The items that requests wait for or hold rows of, and how much memory their rows may take. One thread's.

A delivery waits for memory, is fetched, and has landed or failed. It lasts as long as requests hold it: a request holds
the rows of an item until vLLM has computed past the item, so that rows that vLLM evicts from its own cache before are
still there. Rows of a landed delivery share their memory with vLLM's cache, once a step has loaded them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from vitrine_vlm.vllm_connector.fetching import FetchOrder, FetchResult
from vitrine_vlm.vllm_connector.stats import Outcome, StatsCollector


class OrderTaker(Protocol):
    """The part of `Fetcher` that deliveries need."""

    def fetch(self, order: FetchOrder) -> None: ...

    def cancel(self, delivery_id: int) -> None: ...

    def discard(self, delivery_id: int) -> None: ...

    def take_results(self) -> list[FetchResult]: ...


class Status(Enum):
    WAITING = "waiting for memory"
    IN_FLIGHT = "in flight"
    LANDED = "landed"
    FAILED = "failed"


@dataclass(eq=False)
class Delivery:
    """One item's rows.

    has_own_tower: whether vLLM can encode the item itself, where the request that it began with brings it.
    tried: requests whose orders were tried, the last one's included.
    deadline: monotonic seconds, after which it has failed unless it has landed.
    is_loaded: a step was asked to load it, so only a later step may free it.
    holders: the requests that hold it; True where the request cannot be scheduled without it.
    """

    identifier: str
    order: FetchOrder
    nbytes: int
    has_own_tower: bool
    deadline: float
    tried: set[str]
    status: Status = Status.WAITING
    error: str = ""
    is_loaded: bool = False
    holders: dict[str, bool] = field(default_factory=dict)

    @property
    def pending(self) -> bool:
        return self.status in (Status.WAITING, Status.IN_FLIGHT)


class Deliveries:
    """All deliveries, by the identifier of their item.

    Args:
        fetcher: fetches them.
        max_nbytes: the memory for rows in one worker. The oldest request may exceed it, by what its next step needs,
            because what the others hold may wait for it to go on.
        stats: counts what becomes of them.
        clock: returns monotonic seconds.
    """

    def __init__(
        self, fetcher: OrderTaker, max_nbytes: int, stats: StatsCollector, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetcher, self._max_nbytes, self._stats, self._clock = fetcher, max_nbytes, stats, clock
        self._ids = itertools.count()
        self._by_identifier: dict[str, Delivery] = {}
        self._by_id: dict[int, Delivery] = {}
        self._waiting: dict[Delivery, None] = {}  # in the order of their beginning
        self._held: dict[str, dict[str, None]] = {}  # identifiers by request, the oldest request first
        self._held_nbytes = 0  # of deliveries in flight and landed
        self._to_discard: list[int] = []

    def get(self, identifier: str) -> Delivery | None:
        return self._by_identifier.get(identifier)

    def begin(
        self,
        identifier: str,
        make_order: Callable[[int], FetchOrder],
        nbytes: int,
        timeout_s: float,
        has_own_tower: bool,
    ) -> Delivery:
        """Adds a delivery, which `admit` starts; `make_order` is called with its id."""
        order = make_order(next(self._ids))
        delivery = Delivery(
            identifier, order, nbytes, has_own_tower, self._clock() + timeout_s, tried={order.request_id}
        )
        self._by_identifier[identifier] = self._by_id[order.delivery_id] = delivery
        self._waiting[delivery] = None
        return delivery

    def begin_again(self, delivery: Delivery, make_order: Callable[[int], FetchOrder], timeout_s: float) -> None:
        """Has `admit` start a failed delivery with the order of another request that holds it."""
        order = make_order(next(self._ids))
        del self._by_id[delivery.order.delivery_id]
        self._by_id[order.delivery_id] = delivery
        delivery.order, delivery.deadline = order, self._clock() + timeout_s
        delivery.tried.add(order.request_id)
        delivery.status, delivery.error = Status.WAITING, ""
        self._waiting[delivery] = None

    def hold(self, request_id: str, delivery: Delivery, urgent: bool) -> None:
        """Keeps a delivery for a request.

        Args:
            urgent: the request cannot be scheduled without it.
        """
        delivery.holders[request_id] = urgent
        self._held.setdefault(request_id, {})[delivery.identifier] = None

    def release(self, request_id: str, needed: frozenset[str] | set[str] = frozenset()) -> None:
        """Ends a request's hold on all deliveries but those of the needed identifiers."""
        held = self._held.get(request_id)
        if held is None:
            return
        for identifier in [each for each in held if each not in needed]:
            del held[identifier]
            delivery = self._by_identifier[identifier]
            del delivery.holders[request_id]
            if not delivery.holders:
                self._drop(delivery)
        if not held:
            del self._held[request_id]

    def fail(self, delivery: Delivery, error: str) -> None:
        """Marks a pending delivery as failed."""
        if delivery.status is Status.IN_FLIGHT:
            self._fetcher.cancel(delivery.order.delivery_id)
        self._set_failed(delivery, error)

    def is_late(self, delivery: Delivery) -> bool:
        return delivery.pending and self._clock() > delivery.deadline

    def receive_results(self) -> None:
        for result in self._fetcher.take_results():
            self._receive(result)

    def admit(self) -> None:
        """Starts waiting deliveries, the oldest first, as far as there is memory for them."""
        if not self._waiting:
            return
        oldest, identifiers = next(iter(self._held.items()))
        for delivery in [self._by_identifier[identifier] for identifier in identifiers]:
            if delivery.status is Status.WAITING and delivery.holders[oldest]:
                self._start(delivery)
        for delivery in list(self._waiting):
            if self._held_nbytes + delivery.nbytes > self._max_nbytes:
                break
            self._start(delivery)

    def take_discards(self) -> list[int]:
        """Returns ids of loaded deliveries that no request holds any more; the workers' next step is to free them."""
        discards, self._to_discard = self._to_discard, []
        return discards

    def _start(self, delivery: Delivery) -> None:
        del self._waiting[delivery]
        delivery.status = Status.IN_FLIGHT
        self._add_nbytes(delivery.nbytes)
        self._fetcher.fetch(delivery.order)

    def _receive(self, result: FetchResult) -> None:
        delivery = self._by_id.get(result.delivery_id)
        if delivery is None or delivery.status is not Status.IN_FLIGHT:  # it was cancelled when it had just landed
            if result.error is None:
                self._fetcher.discard(result.delivery_id)
        elif result.error is not None:
            self._set_failed(delivery, f"{result.error.code}: {result.error}")
        else:
            delivery.status = Status.LANDED
            self._stats.landed(result.transport, result.nbytes, result.seconds)

    def _set_failed(self, delivery: Delivery, error: str) -> None:
        if delivery.status is Status.IN_FLIGHT:
            self._add_nbytes(-delivery.nbytes)
        self._waiting.pop(delivery, None)
        delivery.status, delivery.error = Status.FAILED, error
        if delivery.has_own_tower:
            self._stats.count(Outcome.OWN_TOWER)

    def _drop(self, delivery: Delivery) -> None:
        """Removes a delivery that no request holds, wherever it stands."""
        del self._by_identifier[delivery.identifier], self._by_id[delivery.order.delivery_id]
        if delivery.status is Status.FAILED:
            if not delivery.has_own_tower:
                self._stats.count(Outcome.FAILED)
            return
        if delivery.pending:
            self._stats.count(Outcome.CANCELLED)
        if delivery.status is Status.WAITING:
            del self._waiting[delivery]
            return
        self._add_nbytes(-delivery.nbytes)
        if delivery.status is Status.IN_FLIGHT:
            self._fetcher.cancel(delivery.order.delivery_id)
        elif delivery.is_loaded:
            self._to_discard.append(delivery.order.delivery_id)
        else:
            self._fetcher.discard(delivery.order.delivery_id)

    def _add_nbytes(self, nbytes: int) -> None:
        self._held_nbytes += nbytes
        self._stats.landed_nbytes = self._held_nbytes
