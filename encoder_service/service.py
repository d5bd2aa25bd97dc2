"""Encodes the items of a request: load -> open -> admit -> Layout -> cache or decode, batch -> ship, all at once.

An item that is claimed by its ticket was loaded and opened before; layouts alone end behind the Layout.

gRPC and protobuf stay in the servicer: answers go to the `Replies` that the caller passes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Protocol, TypeAlias

import torch

from vitrine_vlm.encoder_service.engine.admission import Admission, Reservation
from vitrine_vlm.encoder_service.engine.batch import PostForwardHook
from vitrine_vlm.encoder_service.engine.batcher import Batcher
from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache, EncodedRows
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia
from vitrine_vlm.encoder_service.tickets import OpenedItem, TicketTable
from vitrine_vlm.errors import BadRequest, InternalError, TooManyItems, VitrineError
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, Reserve
from vitrine_vlm.service_runtime.logs import harmless
from vitrine_vlm.service_runtime.traces import past_span, span
from vitrine_vlm.types import ItemTimings, Layout, MediaItem, Ticket

_log = logging.getLogger(__name__)
_ITEM = "vitrine.item_index"
_STAGE_METRIC = harmless("a metric of stages")

# Answers for one item of a request, by its index.
Work: TypeAlias = Callable[[int, MediaItem], Awaitable[None]]
# Makes a ticket for an opened item, by its index; its rows are cached by the key.
Issue: TypeAlias = Callable[[int, OpenedItem, bytes], Ticket]


class Replies(Protocol):
    """Sends the answers of one request; items answer as they finish, several at once."""

    async def layout(self, item_index: int, layout: Layout) -> None:
        """Sends the item's layout, once its size is known."""
        ...

    def shipment(self, item_index: int) -> AbstractContextManager[Shipment]:
        """Ships the item's rows; what was not sent by the end of the context is discarded."""
        ...

    async def failed(self, item_index: int, error: VitrineError) -> None:
        """Sends why the item could not be encoded; the others go on."""
        ...


class Shipment(Protocol):
    """Ships the rows of one item."""

    @property
    def hook(self) -> PostForwardHook:
        """Queues as much of the shipping as it can behind the forward that computes the rows."""
        ...

    async def send(self, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        """Sends rows [num_tokens, row_width], complete and on any device."""
        ...


class Loader(Protocol):
    """Loads media, see `MediaLoader`."""

    async def load_files(self, item: MediaItem, reserve: Reserve) -> Sequence[bytes]:
        """The encoded files of an item."""
        ...


class Preprocessing(Protocol):
    """Turns files into patches, see `PreprocessPool`."""

    async def open(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        """An item whose size is known, and its layout with its content hash."""
        ...

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        """Its patches, see `OpenedMedia.patches`."""
        ...

    def queue_seconds(self, opened: OpenedMedia) -> float:
        """How much longer others wait for their patches because of this item."""
        ...


class EncodeService:
    """Turns media items into rows. It belongs to one event loop; any number of requests run at once."""

    def __init__(
        self,
        loader: Loader,
        media_budget: ByteBudget,
        preprocess_pool: Preprocessing,
        admission: Admission,
        batcher: Batcher,
        cache: EmbeddingCache,
        tickets: TicketTable,
        *,
        max_items: int,
        metrics: EncoderMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            media_budget: bounds the encoded media of all items in work and of all tickets.
            max_items: items accepted in one request.
            clock: seconds, by which stages are timed.
        """
        self._loader = loader
        self._media_budget = media_budget
        self._preprocess_pool = preprocess_pool
        self._admission = admission
        self._batcher = batcher
        self._cache = cache
        self._tickets = tickets
        self._max_items = max_items
        self._metrics = metrics
        self._clock = clock

    async def encode(
        self, items: Sequence[MediaItem], replies: Replies, tenant: str = "", deadline: float = math.inf
    ) -> None:
        """Answers for each item: its layout as soon as it is known, then its rows, or its failure instead.

        Rows of an equal item of the same tenant are used again. Items finish in any order. Cancelling stops what does
        not run yet.

        Args:
            deadline: when the request ends, seconds of the monotonic clock.

        Raises:
            BadRequest, TooManyItems: see `check_number`.
        """
        await self._answer(
            items, replies, lambda index, item: self._encode_item(index, item, replies, tenant, deadline), "ok"
        )

    async def layouts(
        self,
        items: Sequence[MediaItem],
        replies: Replies,
        tenant: str = "",
        peer: str = "",
        *,
        compute_ahead: bool = False,
    ) -> None:
        """Answers for each item: its layout with a new ticket, or its failure; a ticket that an item has is renewed.

        No work is admitted: the budget of media bytes is all that tickets cost. Cancelling releases all of them.

        Args:
            peer: the name of the peer whose tickets they are.
            compute_ahead: rows are computed before they are claimed, as far as `TicketTable` has places for that.

        Raises:
            BadRequest, TooManyItems: see `check_number`.
        """
        issued: list[bytes] = []

        def issue(index: int, item: OpenedItem, key: bytes) -> Ticket:
            ticket = self._tickets.issue(item, tenant, peer)
            issued.append(ticket.value)
            if compute_ahead and not self._cache.has(key):
                self._tickets.compute_ahead(ticket, functools.partial(self._compute_ahead, index, item, key))
            return ticket

        try:
            await self._answer(
                items, replies, lambda index, item: self._send_layout(index, item, replies, tenant, issue), "layout"
            )
        except asyncio.CancelledError:  # the peer has gone, and uses none of them
            self._tickets.release(issued)
            raise

    def release_tickets(self, tickets: Iterable[bytes]) -> None:
        """See `TicketTable.release`."""
        self._tickets.release(tickets)

    def check_number(self, num_items: int) -> None:
        """
        Raises:
            BadRequest: no items; TooManyItems: more than this encoder takes in one request.
        """
        if not num_items:
            raise BadRequest("the request has no media items: give at least one")
        if num_items > self._max_items:
            raise TooManyItems(f"{num_items} media items: at most {self._max_items} are accepted in one request")

    async def _answer(self, items: Sequence[MediaItem], replies: Replies, work: Work, success: str) -> None:
        """Runs the work of all items at once; `success` is its outcome in the metrics."""
        self.check_number(len(items))
        runs = [self._run_item(index, item, replies, work, success) for index, item in enumerate(items)]
        if len(runs) == 1:  # most requests: no task of its own
            await runs[0]
            return
        async with asyncio.TaskGroup() as tasks:
            for run in runs:
                tasks.create_task(run)

    async def _run_item(self, index: int, item: MediaItem, replies: Replies, work: Work, success: str) -> None:
        """Runs one item's work, answers if it fails, and counts its outcome."""
        outcome = "cancelled"
        try:
            await work(index, item)
            outcome = success
        except VitrineError as error:
            outcome = error.code
            await replies.failed(index, error)
        except Exception:
            _log.exception("item %d failed by a fault of the encoder", index)
            outcome = InternalError.code
            await replies.failed(index, InternalError("the encoder failed on this item; its log has the reason"))
        finally:
            with harmless("a metric of items"):
                self._metrics.items.labels(item.kind, outcome).inc()

    async def _open_item(self, index: int, item: MediaItem, tenant: str) -> OpenedItem:
        """Loads and opens an item, or has that of its ticket; the caller releases its bytes.

        Raises:
            MediaError, Overloaded: see `MediaLoader.load`, `Preprocessor.open` and `ByteBudget.add`.
            TicketExpired: see `TicketTable.opened`; BadRequest: the ticket is of an item of the other kind.
        """
        if item.ticket is not None:
            opened_item = self._tickets.opened(item.ticket.value, tenant)
            if opened_item.layout.kind != item.kind:
                opened_item.reserved.release()
                raise BadRequest(f"item {index} is of kind {item.kind}, its ticket of kind {opened_item.layout.kind}")
            return opened_item
        reserved = self._media_budget.item()
        try:
            with self._stage("load", index) as load:
                files = await self._loader.load_files(item, reserved.reserve)
            with self._stage("open", index) as opening:
                opened, layout = await self._preprocess_pool.open(item, files)
        except BaseException:
            reserved.release()
            raise
        timings = ItemTimings(load_ms=load.elapsed_ms, preprocess_ms=opening.elapsed_ms)
        return OpenedItem(opened, layout, reserved, timings)

    async def _send_layout(self, index: int, item: MediaItem, replies: Replies, tenant: str, issue: Issue) -> None:
        opened = await self._open_item(index, item, tenant)
        with opened.reserved:
            key = _cache_key(opened.layout.content_hash, tenant)
            layout = self._announced(opened.layout, key)
            if item.ticket is None:
                layout = replace(layout, ticket=issue(index, opened, key))
            else:
                self._tickets.renew(item.ticket.value)
            await replies.layout(index, layout)

    async def _compute_ahead(self, index: int, item: OpenedItem, key: bytes) -> None:
        """Computes the rows of a ticket into the cache, where its claim finds them or joins.

        Raises:
            Overloaded, VitrineError: see `Admission.admit`, `PreprocessPool.patches` and `Batcher.encode`.
        """
        # The item's bytes are those of its ticket and claims: once these have ended, this is cancelled.
        preprocess_s = self._preprocess_pool.queue_seconds(item.opened)
        admission = self._admission.admit(
            item.layout.grid_thw, preprocess_s=preprocess_s, reserve=not self._cache.has(key)
        )
        with admission as reservation:
            compute = functools.partial(self._compute, index, item.opened, item.layout, math.inf, None, reservation)
            await self._cache.get_or_compute(key, compute)

    async def _encode_item(self, index: int, item: MediaItem, replies: Replies, tenant: str, deadline: float) -> None:
        source = await self._open_item(index, item, tenant)
        with source.reserved:
            if item.ticket is not None:
                self._tickets.claim_rows(item.ticket.value)
            key = _cache_key(source.layout.content_hash, tenant)
            layout, timings = self._announced(source.layout, key), source.timings
            admission = self._admission.admit(
                layout.grid_thw,
                deadline,
                preprocess_s=self._preprocess_pool.queue_seconds(source.opened),
                reserve=not self._cache.has(key),
            )
            with admission as reservation, replies.shipment(index) as shipment:
                await replies.layout(index, layout)
                compute = functools.partial(
                    self._compute, index, source.opened, layout, deadline, shipment.hook, reservation
                )
                encoded = await self._cache.get_or_compute(key, compute)
                # Shipping to a slow reader takes long: keep nothing but the rows in memory meanwhile.
                del source, compute
                timings = replace(
                    timings,
                    preprocess_ms=timings.preprocess_ms + encoded.preprocess_ms,
                    queue_ms=encoded.queue_ms,
                    forward_ms=encoded.forward_ms,
                )
                with self._stage("ship", index):
                    await shipment.send(encoded.rows_TW, timings)

    def _announced(self, layout: Layout, key: bytes) -> Layout:
        """The layout with how long its rows will take, unless they are cached or in flight, or this is not known."""
        slowness = self._batcher.slowness
        if slowness is None or self._cache.has(key):
            return layout
        return replace(layout, expected=self._admission.expected(layout.grid_thw, slowness))

    async def _compute(
        self,
        index: int,
        opened: OpenedMedia,
        layout: Layout,
        deadline: float,
        hook: PostForwardHook | None,
        reservation: Reservation,
    ) -> EncodedRows:
        # Only now where the cache had these rows and has evicted them since, or where their computation was cancelled.
        reservation.reserve()
        with self._stage("preprocess", index) as preprocess:
            patches_PX = await self._preprocess_pool.patches(opened)
        reservation.end_preprocessing()
        encoded = await self._batcher.encode(patches_PX, layout.grid_thw, deadline, hook)
        queue_s, forward_s = encoded.queue_ms / 1e3, encoded.forward_ms / 1e3
        with harmless("a metric of the queue"):
            self._metrics.observe_stage("queue", queue_s)
            past_span("queue", queue_s + forward_s, queue_s, **{_ITEM: index})
            past_span("forward", forward_s, forward_s, **{_ITEM: index})
        return EncodedRows(encoded.rows_TW, preprocess.elapsed_ms, encoded.queue_ms, encoded.forward_ms)

    def _stage(self, name: str, index: int) -> _Stage:
        return _Stage(name, index, self._clock, self._metrics)


class _Stage:
    """Times one stage of an item, for its answer, the metrics and the trace; metrics leave out stages that fail.

    elapsed_ms: how long it took, once it has ended well.
    """

    # No generator as a context manager: items have five stages, and each would cost them three of these.

    def __init__(self, name: str, index: int, clock: Callable[[], float], metrics: EncoderMetrics) -> None:
        self.elapsed_ms = 0.0
        self._name, self._clock, self._metrics = name, clock, metrics
        self._span = span(name, **{_ITEM: index})

    def __enter__(self) -> _Stage:
        self._started = self._clock()
        self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, traceback)
        if kind is None:
            self.elapsed_ms = (self._clock() - self._started) * 1e3
            with _STAGE_METRIC:
                self._metrics.observe_stage(self._name, self.elapsed_ms / 1e3)


def _cache_key(content_hash: bytes, tenant: str) -> bytes:
    # Tenants share no rows: the speed of an answer would reveal to one what another has sent.
    return hashlib.sha256(f"{len(tenant)}:{tenant}:".encode() + content_hash).digest()
