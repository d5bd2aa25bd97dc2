"""Forms batches by patches and runs them through the tower, one behind the other.

    encode() -> waiting entries -> [former task: take, pack] -> channel of one batch -> [runner task: launch, followers]
             -> [a task a batch: wait for the GPU] -> rows

The former owns the waiting entries; while one batch runs, the next is already packed. On a GPU the next is launched
before the one in front has ended, so that the GPU never waits for Python. Nothing waits for company: when the tower is
idle, whatever is there runs. Items run in the order in which they are due: that of arrival, unless a deadline is near.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from embedding_transport.errors import EncoderUnavailable, InternalError, Overloaded, VitrineError
from encoder_service.engine.cost_model import CostModel
from encoder_service.models import VisionTower
from encoder_service.models.grids import GridTHW

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
# An item is due after so long at the latest, so that those with near deadlines do not keep it waiting for ever.
_PATIENCE_S = 30.0


class Follower(Protocol):
    """Work on an item's rows that is queued right behind the forward, before that has run."""

    def follow(self, rows_TW: torch.Tensor) -> None:
        """Queues the work on the current stream; on the forward's thread. The rows are complete where it runs."""
        ...

    def batch_ended(self) -> None:
        """The batch is over, well or not, and so is what was queued; it may not have come to `follow`. On the loop."""
        ...


@dataclass(frozen=True)
class EncodedItem:
    """Rows of one item, [num_tokens, row_width], complete, on the tower's device, a view into its batch's rows.

    queue_ms, forward_ms: milliseconds.
    """

    rows_TW: torch.Tensor
    queue_ms: float
    forward_ms: float


@dataclass(frozen=True)
class BatchReport:
    """One batch that ran, for metrics."""

    num_items: int
    num_patches: int
    forward_s: float


@dataclass(frozen=True, eq=False)
class _Entry:
    patches_PX: torch.Tensor
    grid_thw: GridTHW
    result: asyncio.Future[EncodedItem]
    deadline: float
    follower: Follower | None
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> float:
        return min(self.deadline, self.queued_at + _PATIENCE_S)


@dataclass(frozen=True)
class _Batch:
    entries: list[_Entry]
    patches_PX: torch.Tensor


@dataclass(frozen=True)
class _Launched:
    """Rows of a batch's items, on a GPU complete only when `end` has passed; seconds by the monotonic clock."""

    rows: list[torch.Tensor]
    started: float
    stopped: float
    start: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None

    def wait(self) -> float:
        """Waits for the rows; returns how long the forward took, seconds."""
        if self.start is None or self.end is None:
            return self.stopped - self.started
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3


class Batcher:
    """Runs items through a vision tower in batches. Belongs to one event loop."""

    def __init__(
        self,
        tower: VisionTower,
        *,
        max_batch_patches: int,
        max_queued_patches: int,
        max_queued_s: float = math.inf,
        cost: CostModel | None = None,
        device: torch.device = _CPU,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        """
        Args:
            tower: runs on a thread of its own, one batch at a time.
            max_batch_patches: a batch takes items up to this many patches; a larger item runs alone.
            max_queued_patches: patches admitted at once, which bounds memory.
            max_queued_s: seconds of work, by `cost`, admitted at once, which bounds waiting. An item that alone is more
                than a bound is admitted when nothing else is.
            device: the tower's; on a GPU two batches are under way at once.
            on_batch: called on the event loop after each batch.
        """
        self._tower = tower
        self._max_batch_patches = max_batch_patches
        self._max_queued_patches = max_queued_patches
        self._on_batch = on_batch
        self._max_queued_s = max_queued_s
        self._cost = cost if cost is not None else CostModel(0.0, 0.0, 0.0)
        self._admitted_patches = 0
        self._admitted_s = 0.0
        self._waiting: list[_Entry] = []  # by when they are due
        self._unfinished: set[_Entry] = set()
        self._arrived = asyncio.Event()
        self._channel: asyncio.Queue[_Batch] = asyncio.Queue(maxsize=1)
        self._channel_free = asyncio.Semaphore(1)
        self._device = device
        self._may_launch = asyncio.Semaphore(1 if device.type == "cpu" else 2)
        self._packing_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-pack")
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-forward")
        self._waiting_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder-wait")
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begins to run batches. Must be called on the event loop that later calls `encode`."""
        self._tasks = {asyncio.create_task(self._form_batches()), asyncio.create_task(self._run_batches())}

    async def close(self) -> None:
        """Stops. Items without rows fail with EncoderUnavailable; a batch that runs is waited for and dropped."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail(self._unfinished, _closed_error())
        await asyncio.to_thread(self._packing_thread.shutdown)
        await asyncio.to_thread(self._forward_thread.shutdown)
        await asyncio.to_thread(self._waiting_thread.shutdown)

    @property
    def admitted_patches(self) -> int:
        """Patches of all items between admission and the end of shipping."""
        return self._admitted_patches

    @property
    def admitted_s(self) -> float:
        """Seconds of the tower's work that these items are."""
        return self._admitted_s

    @property
    def waiting_patches(self) -> int:
        """Patches ready for the tower that are in no batch yet."""
        return sum(len(entry.patches_PX) for entry in self._waiting)

    @contextmanager
    def admit(self, grid_thw: GridTHW, deadline: float = math.inf) -> Iterator[None]:
        """Holds room for an item from before its pixels are decoded until its rows have been shipped.

        Args:
            deadline: when its request ends, seconds of the monotonic clock.

        Raises:
            Overloaded: the encoder holds as much as it may, or too much for the item to be done in time.
        """
        num_patches, seconds = math.prod(grid_thw), self._cost.seconds(grid_thw)
        if self._admitted_patches:
            self._check_room(num_patches, seconds)
            self._check_deadline(seconds, deadline)
        self._admitted_patches += num_patches
        self._admitted_s += seconds
        try:
            yield
        finally:
            self._admitted_patches -= num_patches
            # Sums of floats taken apart again leave dust.
            self._admitted_s = max(0.0, self._admitted_s - seconds) if self._admitted_patches else 0.0

    def _check_room(self, num_patches: int, seconds: float) -> None:
        if self._admitted_patches + num_patches > self._max_queued_patches:
            raise Overloaded(
                f"{self._admitted_patches} patches are queued and {num_patches} more would pass the limit of "
                f"{self._max_queued_patches}: retry later or add encoders",
                retry_after_s=seconds,
            )
        too_much_s = self._admitted_s + seconds - self._max_queued_s
        if too_much_s > 0:
            raise Overloaded(
                f"{self._admitted_s:.1f} s of work are queued and {seconds:.2g} s more would pass the limit of "
                f"{self._max_queued_s:g} s: retry in {too_much_s:.1f} s or add encoders",
                retry_after_s=too_much_s,
            )

    def _check_deadline(self, seconds: float, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if self._admitted_s + seconds > left_s:
            raise Overloaded(
                f"{self._admitted_s:.2g} s of work are queued and the item takes {seconds:.2g} s more, but its request "
                f"ends in {left_s:.2g} s: give it more time or add encoders",
                retry_after_s=self._admitted_s,
            )

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
        entry = _Entry(patches_PX, grid_thw, asyncio.get_running_loop().create_future(), deadline, follower)
        insort(self._waiting, entry, key=lambda each: each.due)
        self._unfinished.add(entry)
        self._arrived.set()
        try:
            return await entry.result
        finally:
            self._unfinished.discard(entry)

    async def _form_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._channel_free.acquire()
            while not (entries := self._take()):
                self._arrived.clear()
                await self._arrived.wait()
            try:
                packed_PX = await loop.run_in_executor(self._packing_thread, _pack, entries)
            except Exception:
                self._fail_batch(entries)
                self._channel_free.release()
                continue
            self._channel.put_nowait(_Batch(entries, packed_PX))

    def _take(self) -> list[_Entry]:
        """The next batch: waiting entries as they are due, less cancelled ones, while they fit.

        None joins that would make the first one late.
        """
        entries: list[_Entry] = []
        num_patches, slack_s = 0, math.inf
        while self._waiting:
            entry = self._waiting[0]
            if not entry.result.done():
                seconds = self._cost.seconds(entry.grid_thw)
                num_patches += len(entry.patches_PX)
                if entries and (num_patches > self._max_batch_patches or seconds > slack_s):
                    break
                slack_s = slack_s - seconds if entries else _slack_s(entry, seconds)
                entries.append(entry)
            self._waiting.pop(0)
        return entries

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._may_launch.acquire()
            batch = await self._channel.get()
            self._channel_free.release()
            if all(entry.result.done() for entry in batch.entries):
                self._may_launch.release()
                continue
            try:
                launched = await loop.run_in_executor(self._forward_thread, self._launch, batch)
            except Exception:
                self._fail_batch(batch.entries)
                self._may_launch.release()
                self._end_followers(batch)
                continue
            task = asyncio.create_task(self._finish(batch, launched))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _launch(self, batch: _Batch) -> _Launched:
        started = time.monotonic()
        if self._device.type == "cpu":
            rows = self._forward(batch)
            return _Launched(rows, started, time.monotonic())
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            rows = self._forward(batch)
        except Exception:
            # Followers that were served already may still write, and are about to be told that they do not.
            torch.cuda.current_stream(self._device).synchronize()
            raise
        end.record()
        return _Launched(rows, started, time.monotonic(), start, end)

    def _forward(self, batch: _Batch) -> list[torch.Tensor]:
        """Rows of each item, with what follows them queued behind."""
        rows_TW = self._tower.forward(batch.patches_PX, [entry.grid_thw for entry in batch.entries])
        num_tokens = [len(entry.patches_PX) // self._tower.merge_unit for entry in batch.entries]
        rows = list(rows_TW.split(num_tokens))
        for entry, item_TW in zip(batch.entries, rows, strict=True):
            if entry.follower is not None:
                entry.follower.follow(item_TW)
        return rows

    async def _finish(self, batch: _Batch, launched: _Launched) -> None:
        try:
            forward_s = await asyncio.get_running_loop().run_in_executor(self._waiting_thread, launched.wait)
        except Exception:
            self._fail_batch(batch.entries)
            return
        finally:
            self._may_launch.release()
            self._end_followers(batch)
        self._cost.observe([entry.grid_thw for entry in batch.entries], forward_s)
        self._on_batch(BatchReport(len(batch.entries), len(batch.patches_PX), forward_s))
        for entry, rows_TW in zip(batch.entries, launched.rows, strict=True):
            if not entry.result.done():
                queue_ms = (launched.started - entry.queued_at) * 1e3
                entry.result.set_result(EncodedItem(rows_TW, queue_ms, forward_s * 1e3))

    @staticmethod
    def _end_followers(batch: _Batch) -> None:
        for entry in batch.entries:
            if entry.follower is not None:
                entry.follower.batch_ended()

    def _fail_batch(self, entries: list[_Entry]) -> None:
        _log.exception("a batch failed, grids %s", [entry.grid_thw for entry in entries])
        self._fail(entries, InternalError("the vision tower failed; the encoder's log has the reason"))

    @staticmethod
    def _fail(entries: Iterable[_Entry], error: VitrineError) -> None:
        for entry in entries:
            if not entry.result.done():
                entry.result.set_exception(error)


def _slack_s(entry: _Entry, seconds: float) -> float:
    """How much more than its own `seconds` of work may run with it; without limit if it is late anyway."""
    slack_s = entry.deadline - time.monotonic() - seconds
    return slack_s if slack_s > 0 else math.inf


def _pack(entries: list[_Entry]) -> torch.Tensor:
    for entry in entries:
        if entry.patches_PX.is_cuda:
            # Made on another stream: the memory must not be used again before what this thread launches has read it.
            entry.patches_PX.record_stream(torch.cuda.current_stream(entry.patches_PX.device))
    # Of different dtypes where images and videos come together on a GPU.
    return torch.cat([entry.patches_PX for entry in entries]) if len(entries) > 1 else entries[0].patches_PX


def _closed_error() -> EncoderUnavailable:
    return EncoderUnavailable("the encoder is shutting down: send the request to another one")
