"""Builds batches by patches and runs them through the tower, one behind the other.

    encode() -> waiting queue -> [batch builder: pop, pack] -> channel of one batch -> [batch runner: launch, hooks]
             -> launched batches -> [batch finisher: wait for the GPU] -> rows

While a batch runs, the builder has the next one packed already. On a GPU the next one is launched before the one in
front has ended, so that the GPU never waits for Python; it is built no earlier than that takes, so that items which
arrive meanwhile join it. An idle tower runs at once what there is.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from vitrine_vlm.encoder_service.engine.batch import Batch, EncodedItem, LaunchedBatch, PostForwardHook, QueuedItem
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.engine.in_flight_batches import InFlightBatches
from vitrine_vlm.encoder_service.engine.tower_speed import TowerSpeed
from vitrine_vlm.encoder_service.engine.waiting_queue import WaitingQueue
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.errors import EncoderUnavailable, InternalError, VitrineError
from vitrine_vlm.gpu_kernels.gpu_faults import is_lost
from vitrine_vlm.service_runtime.logs import harmless
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
# A batch is built this long before the tower should be free: packing and launching take less, mostly even under load.
_LEAD_S = 0.02
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BatchReport:
    """One batch that ran, for metrics. forward_s: how long its forward took."""

    num_items: int
    num_patches: int
    forward_s: float


class Batcher:
    """Runs items through a vision tower in batches. It belongs to one event loop."""

    def __init__(
        self,
        tower: VisionTower,
        cost: CostModel,
        *,
        max_batch_patches: int,
        device: torch.device = _CPU,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
        on_gpu_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tower: runs on a thread of its own, one batch at a time.
            cost: is corrected by every batch.
            max_batch_patches: patches in a batch at most; a larger item runs alone.
            device: the tower's; on a GPU two batches are launched at once.
            on_batch: called on the event loop after each batch.
            on_gpu_lost: called on the event loop if the GPU can run no further batch after one that failed.
            clock: seconds, that of deadlines.
        """
        self._tower = tower
        self._cost = cost
        self._on_batch = on_batch
        self._on_gpu_lost = on_gpu_lost
        self._clock = clock
        self._queue = WaitingQueue(cost, max_batch_patches, clock)
        self._in_flight = InFlightBatches(clock)
        self._unfinished: set[QueuedItem] = set()
        self._arrived = asyncio.Event()
        self._tower_speed = TowerSpeed(clock)
        self._builds_later = False  # the builder waits for the tower, not for an item
        self._channel: asyncio.Queue[Batch] = asyncio.Queue(maxsize=1)
        self._channel_free = asyncio.Semaphore(1)
        self._device = device
        self._may_launch = asyncio.Semaphore(1 if device.type == "cpu" else 2)
        self._pack_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-pack")
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-forward")
        self._wait_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-wait")
        self._launched: asyncio.Queue[tuple[Batch, LaunchedBatch]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self, supervisor: Supervisor) -> None:
        """Starts three loops, which the supervisor owns. Call it on the event loop that calls `encode`."""
        self._supervisor = supervisor
        self._tasks = [
            supervisor.start_task("batch builder", self._build_batches()),
            supervisor.start_task("batch runner", self._run_batches()),
            supervisor.start_task("batch finisher", self._finish_batches()),
        ]

    async def close(self) -> None:
        """Stops. Items without rows fail with EncoderUnavailable; a batch that runs is waited for and discarded."""
        self._closed = True
        if self._tasks:
            await self._supervisor.stop(*self._tasks)
        _fail(self._unfinished, _closed_error())
        for thread in (self._pack_thread, self._forward_thread, self._wait_thread):
            await asyncio.to_thread(thread.shutdown)

    @property
    def waiting_patches(self) -> int:
        """Patches ready for the tower that are in no batch yet."""
        return self._queue.num_patches

    @property
    def slowness(self) -> float | None:
        """See `TowerSpeed.slowness`."""
        return self._tower_speed.slowness(self._in_flight.front)

    async def encode(
        self,
        patches_PX: torch.Tensor,
        grid_thw: GridTHW,
        deadline: float = math.inf,
        hook: PostForwardHook | None = None,
    ) -> EncodedItem:
        """Rows of one item. Cancelling removes it from the queue, or discards its rows if it is running.

        Args:
            patches_PX: [t * h * w, patch width], complete, on any device; see `VisionTower.forward`.
            grid_thw: patches along time, height and width.
            deadline: when the item's request ends, seconds of the monotonic clock.
            hook: called with the rows behind the forward; the work that it queues has ended, too, when this returns.

        Raises:
            InternalError: the forward failed; the reason is in the log.
            EncoderUnavailable: the batcher was closed.
        """
        if self._closed:
            raise _closed_error()
        item = QueuedItem(
            patches_PX, grid_thw, asyncio.get_running_loop().create_future(), deadline, hook, self._clock()
        )
        self._queue.add(item)
        self._unfinished.add(item)
        if not self._builds_later or self._queue.is_full:
            self._arrived.set()
        try:
            return await item.result
        finally:
            self._unfinished.discard(item)
            self._queue.discard(item)

    async def _build_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._channel_free.acquire()
            items = await self._next_items()
            self._in_flight.add(items, self._cost.batch_seconds([item.grid_thw for item in items]))
            try:
                batch = await loop.run_in_executor(self._pack_thread, Batch.pack, items)
            except Exception:
                await self._fail_batch(items)
                self._end(items)
                self._channel_free.release()
                continue
            self._channel.put_nowait(batch)

    async def _next_items(self) -> list[QueuedItem]:
        """The items of the next batch, once there are any, and no earlier than needed while the tower is busy."""
        while True:
            spare_s = self._in_flight.left_s - _LEAD_S
            may_build = spare_s <= 0 or self._queue.is_full
            if may_build and (items := self._queue.pop_batch()):
                return items
            self._arrived.clear()
            self._builds_later = not may_build
            if not self._builds_later:
                await self._arrived.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(spare_s):
                    await self._arrived.wait()

    def _end(self, items: list[QueuedItem]) -> None:
        """Counts a batch as ended; that may be sooner than expected, so the builder looks again."""
        self._in_flight.remove(items)
        self._arrived.set()

    def _release_tower(self, batch: Batch) -> None:
        """Lets the next batch be launched after this one, whether this one ran or not."""
        self._may_launch.release()
        self._end(batch.items)

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._may_launch.acquire()
            batch = await self._channel.get()
            self._channel_free.release()
            if all(item.result.done() for item in batch.items):
                self._release_tower(batch)
                continue
            try:
                launched = await loop.run_in_executor(
                    self._forward_thread, batch.launch, self._tower, self._device, self._clock
                )
            except Exception:
                await self._fail_batch(batch.items)
                self._release_tower(batch)
                batch.notify_hooks()
                continue
            self._launched.put_nowait((batch, launched))

    async def _finish_batches(self) -> None:
        while True:
            await self._finish(*await self._launched.get())

    async def _finish(self, batch: Batch, launched: LaunchedBatch) -> None:
        forward_s: float | None = None
        try:
            forward_s = await asyncio.get_running_loop().run_in_executor(self._wait_thread, launched.wait)
        except Exception:
            await self._fail_batch(batch.items)
        finally:
            self._release_tower(batch)
            batch.notify_hooks()
        if forward_s is None:
            return
        # Results are set first: nothing below may keep an item from its rows.
        for item, rows_TW in zip(batch.items, launched.rows, strict=True):
            if not item.result.done():
                queue_ms = (launched.started_at - item.queued_at) * 1e3
                item.result.set_result(EncodedItem(rows_TW, queue_ms, forward_s * 1e3))
        grids = [item.grid_thw for item in batch.items]
        self._tower_speed.add(forward_s, self._cost.batch_seconds(grids))
        self._cost.observe(grids, forward_s)
        with harmless("a metric of batches"):
            self._on_batch(BatchReport(len(batch.items), batch.patches_PX.shape[0], forward_s))

    async def _fail_batch(self, items: list[QueuedItem]) -> None:
        """Fails the items of a batch; called in the handler of the exception."""
        _log.exception("a batch failed, grids %s", [item.grid_thw for item in items])
        # Before the items fail: the encoder fails with its GPU, and clients may then send them to another one.
        if await asyncio.get_running_loop().run_in_executor(self._wait_thread, is_lost, self._device):
            self._on_gpu_lost()
        _fail(items, InternalError("the vision tower failed; the encoder's log has the reason"))


def _fail(items: Iterable[QueuedItem], error: VitrineError) -> None:
    for item in items:
        if not item.result.done():
            item.result.set_exception(error)


def _closed_error() -> EncoderUnavailable:
    return EncoderUnavailable("the encoder is shutting down: send the request to another one")
