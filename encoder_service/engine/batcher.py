"""Forms batches by patches and runs them through the tower, one behind the other.

    encode() -> waiting entries -> [former task: take, pack] -> channel of one batch -> [runner task: launch, followers]
             -> launched batches -> [finisher task: wait for the GPU] -> rows

The former owns the waiting entries; when a batch ends, the next is already packed. On a GPU the next is launched before
the one in front has ended, so that the GPU never waits for Python. It is formed no earlier than that takes: what comes
meanwhile goes along. Nothing waits for company: when the tower is idle, whatever is there runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from vitrine_vlm.encoder_service.engine.batch import Batch, EncodedItem, Entry, Follower, Launched
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.engine.under_way import UnderWay
from vitrine_vlm.encoder_service.engine.waiting import Waiting
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.errors import EncoderUnavailable, InternalError, VitrineError
from vitrine_vlm.gpu_kernels.gpu_faults import is_lost
from vitrine_vlm.service_runtime.logs import harmless
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
# Before the tower should be free, by when a batch is formed: packing and launching take less, even under load mostly.
_LEAD_S = 0.02
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BatchReport:
    """One batch that ran, for metrics."""

    num_items: int
    num_patches: int
    forward_s: float


class Batcher:
    """Runs items through a vision tower in batches. Belongs to one event loop."""

    def __init__(
        self,
        tower: VisionTower,
        cost: CostModel,
        *,
        max_batch_patches: int,
        device: torch.device = _CPU,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
        on_gpu_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            tower: runs on a thread of its own, one batch at a time.
            cost: learns from every batch.
            max_batch_patches: a batch takes items up to this many patches; a larger item runs alone.
            device: the tower's; on a GPU two batches are under way at once.
            on_batch: called on the event loop after each batch.
            on_gpu_lost: called there where the GPU will run no other batch after one that failed.
        """
        self._tower = tower
        self._cost = cost
        self._on_batch = on_batch
        self._on_gpu_lost = on_gpu_lost
        self._waiting = Waiting(cost, max_batch_patches)
        self._under_way = UnderWay()
        self._unfinished: set[Entry] = set()
        self._arrived = asyncio.Event()
        self._forms_later = False  # the former waits for the tower, not for an item
        self._channel: asyncio.Queue[Batch] = asyncio.Queue(maxsize=1)
        self._channel_free = asyncio.Semaphore(1)
        self._device = device
        self._may_launch = asyncio.Semaphore(1 if device.type == "cpu" else 2)
        self._packing_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-pack")
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-forward")
        self._waiting_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-wait")
        self._launched: asyncio.Queue[tuple[Batch, Launched]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self, supervisor: Supervisor) -> None:
        """Begins to run batches, in three loops that the supervisor owns. Call it on the loop that calls `encode`."""
        self._supervisor = supervisor
        self._tasks = [
            supervisor.start_task("batch builder", self._form_batches()),
            supervisor.start_task("batch runner", self._run_batches()),
            supervisor.start_task("batch finisher", self._finish_batches()),
        ]

    async def close(self) -> None:
        """Stops. Items without rows fail with EncoderUnavailable; a batch that runs is waited for and dropped."""
        self._closed = True
        if self._tasks:
            await self._supervisor.stop(*self._tasks)
        _fail(self._unfinished, _closed_error())
        for thread in (self._packing_thread, self._forward_thread, self._waiting_thread):
            await asyncio.to_thread(thread.shutdown)

    @property
    def waiting_patches(self) -> int:
        """Patches ready for the tower that are in no batch yet."""
        return self._waiting.num_patches

    async def encode(
        self,
        patches_PX: torch.Tensor,
        grid_thw: GridTHW,
        deadline: float = math.inf,
        follower: Follower | None = None,
    ) -> EncodedItem:
        """Rows of one item. Cancelling takes it out of the queue, or drops its rows if it is running.

        Args:
            patches_PX: [t * h * w, patch width], complete, on any device; see `VisionTower.forward`.
            grid_thw: patches along time, height and width.
            deadline: when its request ends, seconds of the monotonic clock.
            follower: works on the rows in the forward's wake; what it queues has run, too, when this returns.

        Raises:
            InternalError: the forward failed; the reason is in the log.
            EncoderUnavailable: the batcher was closed.
        """
        if self._closed:
            raise _closed_error()
        entry = Entry(patches_PX, grid_thw, asyncio.get_running_loop().create_future(), deadline, follower)
        self._waiting.add(entry)
        self._unfinished.add(entry)
        if not self._forms_later or self._waiting.is_full:
            self._arrived.set()
        try:
            return await entry.result
        finally:
            self._unfinished.discard(entry)
            self._waiting.discard(entry)

    async def _form_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._channel_free.acquire()
            entries = await self._next_entries()
            self._under_way.begin(entries, self._cost.batch_seconds([entry.grid_thw for entry in entries]))
            try:
                batch = await loop.run_in_executor(self._packing_thread, Batch.packed, entries)
            except Exception:
                await self._fail_batch(entries)
                self._end(entries)
                self._channel_free.release()
                continue
            self._channel.put_nowait(batch)

    async def _next_entries(self) -> list[Entry]:
        """As soon as there are any, unless the tower is busy and others can still join them."""
        while True:
            spare_s = self._under_way.left_s - _LEAD_S
            may_take = spare_s <= 0 or self._waiting.is_full
            if may_take and (entries := self._waiting.take()):
                return entries
            self._arrived.clear()
            self._forms_later = not may_take
            with suppress(TimeoutError):
                async with asyncio.timeout(spare_s if self._forms_later else None):
                    await self._arrived.wait()

    def _end(self, entries: list[Entry]) -> None:
        """Of a batch; sooner than was thought, perhaps."""
        self._under_way.end(entries)
        self._arrived.set()

    def _make_room(self, batch: Batch) -> None:
        """The tower is free of the batch, whether it ran or not."""
        self._may_launch.release()
        self._end(batch.entries)

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._may_launch.acquire()
            batch = await self._channel.get()
            self._channel_free.release()
            if all(entry.result.done() for entry in batch.entries):
                self._make_room(batch)
                continue
            try:
                launched = await loop.run_in_executor(self._forward_thread, batch.launch, self._tower, self._device)
            except Exception:
                await self._fail_batch(batch.entries)
                self._make_room(batch)
                batch.end_followers()
                continue
            self._launched.put_nowait((batch, launched))

    async def _finish_batches(self) -> None:
        while True:
            await self._finish(*await self._launched.get())

    async def _finish(self, batch: Batch, launched: Launched) -> None:
        forward_s: float | None = None
        try:
            forward_s = await asyncio.get_running_loop().run_in_executor(self._waiting_thread, launched.wait)
        except Exception:
            await self._fail_batch(batch.entries)
        finally:
            self._make_room(batch)
            batch.end_followers()
        if forward_s is None:
            return
        # First: nothing that follows may keep an item from its rows.
        for entry, rows_TW in zip(batch.entries, launched.rows, strict=True):
            if not entry.result.done():
                queue_ms = (launched.started - entry.queued_at) * 1e3
                entry.result.set_result(EncodedItem(rows_TW, queue_ms, forward_s * 1e3))
        self._cost.observe([entry.grid_thw for entry in batch.entries], forward_s)
        with harmless("a metric of batches"):
            self._on_batch(BatchReport(len(batch.entries), len(batch.patches_PX), forward_s))

    async def _fail_batch(self, entries: list[Entry]) -> None:
        """In the handler of what went wrong."""
        _log.exception("a batch failed, grids %s", [entry.grid_thw for entry in entries])
        # First: with its GPU the encoder fails, and then its items may go elsewhere.
        if await asyncio.get_running_loop().run_in_executor(self._waiting_thread, is_lost, self._device):
            self._on_gpu_lost()
        _fail(entries, InternalError("the vision tower failed; the encoder's log has the reason"))


def _fail(entries: Iterable[Entry], error: VitrineError) -> None:
    for entry in entries:
        if not entry.result.done():
            entry.result.set_exception(error)


def _closed_error() -> EncoderUnavailable:
    return EncoderUnavailable("the encoder is shutting down: send the request to another one")
