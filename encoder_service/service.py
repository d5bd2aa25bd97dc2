"""Encodes the items of a request: load -> open -> admit -> Layout -> cache or decode, batch -> ship, all at once.

Knows neither gRPC nor protobuf: how rows leave is the caller's `ship`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from embedding_transport.errors import BadRequest, InternalError, TooManyItems, VitrineError
from embedding_transport.types import ItemTimings, Layout, LayoutEvent, MediaItem
from encoder_service.engine.batcher import Batcher
from encoder_service.engine.cache import EmbeddingCache, MadeRows
from encoder_service.media.loader import MediaLoader
from encoder_service.metrics import EncoderMetrics
from encoder_service.preprocess.preprocessor import OpenedMedia, Preprocessor
from service_runtime.traces import past_span, span

_log = logging.getLogger(__name__)
_ITEM = "vitrine.item_index"

# Events made ahead of a slow reader; a chunk of rows is the largest, about 1 MiB.
_MAX_EVENTS_AHEAD = 4

Shipped = TypeVar("Shipped")
Result = TypeVar("Result")
Ship = Callable[[int, torch.Tensor, ItemTimings], AsyncGenerator[Shipped, None]]
"""(item_index, rows_TW [num_tokens, row_width], complete and on any device, timings so far) -> what the peer gets."""


@dataclass(frozen=True)
class ItemFailed:
    """Item `item_index` could not be encoded; the others go on."""

    item_index: int
    error: VitrineError


class EncodeService:
    """Turns media items into rows. Belongs to one event loop; any number of requests run at once."""

    def __init__(
        self,
        loader: MediaLoader,
        preprocessor: Preprocessor,
        batcher: Batcher,
        cache: EmbeddingCache,
        *,
        revision: str,
        max_items: int,
        num_threads: int,
        metrics: EncoderMetrics,
    ) -> None:
        """
        Args:
            revision: of the model; part of an item's content hash.
            max_items: accepted in one request.
            num_threads: items decoded and preprocessed at once.
        """
        self._loader = loader
        self._preprocessor = preprocessor
        self._batcher = batcher
        self._cache = cache
        self._max_items = max_items
        self._metrics = metrics
        self._hash_seed = f"{preprocessor.settings.fingerprint()}:{revision}"
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="encoder-preprocess")

    def close(self) -> None:
        """Drops decoding that has not begun and waits for the rest."""
        self._threads.shutdown(cancel_futures=True)

    async def encode(
        self, items: Sequence[MediaItem], ship: Ship[Shipped], tenant: str = "", deadline: float = math.inf
    ) -> AsyncGenerator[LayoutEvent | Shipped | ItemFailed, None]:
        """Per item: its layout as soon as it is known, then whatever `ship` makes of its rows, or ItemFailed instead.

        Rows of an equal item of the same tenant are used again. Items finish in any order. Close the iterator (or
        cancel its reader) to stop everything that is not yet running.

        Args:
            deadline: when the request ends, seconds of the monotonic clock.

        Raises:
            BadRequest: no items; TooManyItems: more than this encoder takes in one request.
        """
        if not items:
            raise BadRequest("the request has no media items: give at least one")
        if len(items) > self._max_items:
            raise TooManyItems(f"{len(items)} media items: at most {self._max_items} are accepted in one request")
        events: asyncio.Queue[LayoutEvent | Shipped | ItemFailed | None] = asyncio.Queue(_MAX_EVENTS_AHEAD)
        tasks = [
            asyncio.create_task(self._run_item(index, item, ship, tenant, deadline, events.put))
            for index, item in enumerate(items)
        ]
        try:
            num_running = len(tasks)
            while num_running:
                event = await events.get()
                if event is None:
                    num_running -= 1
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_item(
        self,
        index: int,
        item: MediaItem,
        ship: Ship[Shipped],
        tenant: str,
        deadline: float,
        put: Callable[[LayoutEvent | Shipped | ItemFailed | None], Awaitable[None]],
    ) -> None:
        """One item from start to end; None is its last event."""
        outcome = "cancelled"
        try:
            async with aclosing(self._encode_item(index, item, ship, tenant, deadline)) as events:
                async for event in events:
                    await put(event)
            outcome = "ok"
        except VitrineError as error:
            outcome = error.code
            await put(ItemFailed(index, error))
        except Exception:
            _log.exception("item %d failed for a reason that is a fault of ours", index)
            outcome = InternalError.code
            await put(ItemFailed(index, InternalError("the encoder failed on this item; its log has the reason")))
        finally:
            self._metrics.items.labels(item.kind, outcome).inc()
        await put(None)

    async def _encode_item(
        self, index: int, item: MediaItem, ship: Ship[Shipped], tenant: str, deadline: float
    ) -> AsyncGenerator[LayoutEvent | Shipped, None]:
        with self._stage("load", index) as load:
            data = await self._loader.load(item)
        with self._stage("open", index) as opening:
            opened, layout = await self._in_thread(self._open, item, data)
        key = self._cache_key(tenant, layout)
        with nullcontext() if self._cache.knows(key) else self._batcher.admit(layout.grid_thw, deadline):
            yield LayoutEvent(index, layout)
            made = await self._cache.rows(key, functools.partial(self._make, index, opened, layout, deadline))
            # Shipping to a slow reader takes long: hold no more than the rows meanwhile.
            del opened, data
            timings = ItemTimings(
                load_ms=load.elapsed_ms,
                preprocess_ms=opening.elapsed_ms + made.preprocess_ms,
                queue_ms=made.queue_ms,
                forward_ms=made.forward_ms,
            )
            with self._stage("ship", index):
                async with aclosing(ship(index, made.rows_TW, timings)) as shipped:
                    async for part in shipped:
                        yield part

    async def _make(self, index: int, opened: OpenedMedia, layout: Layout, deadline: float) -> MadeRows:
        with self._stage("preprocess", index) as preprocess:
            patches_PX = await self._in_thread(opened.patches)
        encoded = await self._batcher.encode(patches_PX, layout.grid_thw, deadline)
        queue_s, forward_s = encoded.queue_ms / 1e3, encoded.forward_ms / 1e3
        self._metrics.stage_seconds.labels("queue").observe(queue_s)
        past_span("queue", queue_s + forward_s, queue_s, **{_ITEM: index})
        past_span("forward", forward_s, forward_s, **{_ITEM: index})
        return MadeRows(encoded.rows_TW, preprocess.elapsed_ms, encoded.queue_ms, encoded.forward_ms)

    @staticmethod
    def _cache_key(tenant: str, layout: Layout) -> bytes:
        """Tenants share no rows: how fast an answer comes would tell one what another has sent."""
        return hashlib.sha256(f"{len(tenant)}:{tenant}:".encode() + layout.content_hash).digest()

    def _open(self, item: MediaItem, data: bytes) -> tuple[OpenedMedia, Layout]:
        opened = self._preprocessor.open(item.kind, data, item.video_fps)
        return opened, replace(opened.layout, content_hash=self._content_hash(item, data))

    def _content_hash(self, item: MediaItem, data: bytes) -> bytes:
        """SHA-256 over everything that decides the rows; equal items have equal rows."""
        digest = hashlib.sha256(f"{self._hash_seed}:{item.kind}:{item.video_fps}:".encode())
        digest.update(data)
        return digest.digest()

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @contextmanager
    def _stage(self, name: str, index: int) -> Iterator[_Stopwatch]:
        """Times one stage, for the item, the metrics and the trace; stages that fail are not in the metrics."""
        stopwatch = _Stopwatch()
        with span(name, **{_ITEM: index}):
            yield stopwatch
        stopwatch.elapsed_ms = (time.monotonic() - stopwatch.started) * 1e3
        self._metrics.stage_seconds.labels(name).observe(stopwatch.elapsed_ms / 1e3)


@dataclass
class _Stopwatch:
    started: float = field(default_factory=time.monotonic)
    elapsed_ms: float = 0.0
