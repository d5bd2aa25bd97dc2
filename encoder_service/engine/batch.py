"""One batch: its items are packed, launched through the tower and waited for, on the batcher's threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW

# An item is due this long after its arrival at the latest, so that items with near deadlines cannot starve it.
_MAX_DUE_S = 30.0


class PostForwardHook(Protocol):
    """Work on an item's rows that is queued right behind the forward, before the forward has run."""

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        """Queues the work on the current stream, where the rows are complete. Called on the forward's thread."""
        ...

    def batch_ended(self) -> None:
        """The batch has ended, well or not, and so has the queued work.

        Called on the event loop, also where `enqueue` was not called.
        """
        ...


@dataclass(frozen=True)
class EncodedItem:
    """Rows of one item, [num_tokens, row_width], complete, on the tower's device, a view into its batch's rows.

    queue_ms: how long the item waited for its batch's launch; forward_ms: how long the batch's forward took.
    """

    rows_TW: torch.Tensor
    queue_ms: float
    forward_ms: float


@dataclass(frozen=True, eq=False)
class QueuedItem:
    """An item whose rows are still to be computed.

    patches_PX, grid_thw: see `VisionTower.forward`.
    result: is set to the item's rows or to an error; cancelled where its request ends before.
    deadline, queued_at, due: seconds of the monotonic clock.
    """

    patches_PX: torch.Tensor
    grid_thw: GridTHW
    result: asyncio.Future[EncodedItem]
    deadline: float
    hook: PostForwardHook | None
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def num_patches(self) -> int:
        return self.patches_PX.shape[0]

    @property
    def due(self) -> float:
        return min(self.deadline, self.queued_at + _MAX_DUE_S)


@dataclass(frozen=True)
class Batch:
    """Items that run together. patches_PX: the patches of all items, one item behind the other."""

    items: list[QueuedItem]
    patches_PX: torch.Tensor

    @classmethod
    def pack(cls, items: list[QueuedItem]) -> Batch:
        """Concatenates the items' patches."""
        for item in items:
            if item.patches_PX.is_cuda:
                # Made on another stream: their memory must not be reused before what this thread launches has read it.
                item.patches_PX.record_stream(torch.cuda.current_stream(item.patches_PX.device))
        # On a GPU images and videos have different dtypes; cat promotes them.
        patches = [item.patches_PX for item in items]
        return cls(items, torch.cat(patches) if len(patches) > 1 else patches[0])

    def launch(
        self, tower: VisionTower, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> LaunchedBatch:
        """Runs the batch through the tower, which is on `device`; on a GPU its work is only queued on return."""
        started_at = clock()
        if device.type == "cpu":
            rows = self._forward(tower)
            return LaunchedBatch(rows, started_at, clock())
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            rows = self._forward(tower)
        except Exception:
            # Hooks that were called may still write, and are notified next that their work has ended.
            torch.cuda.current_stream(device).synchronize()
            raise
        end.record()
        return LaunchedBatch(rows, started_at, clock(), start, end)

    def notify_hooks(self) -> None:
        """Calls `batch_ended` of every item's hook."""
        for item in self.items:
            if item.hook is not None:
                item.hook.batch_ended()

    def _forward(self, tower: VisionTower) -> list[torch.Tensor]:
        """Rows of each item; the hooks' work is queued behind them."""
        rows_TW = tower.forward(self.patches_PX, [item.grid_thw for item in self.items])
        num_tokens = [item.num_patches // tower.merge_unit for item in self.items]
        rows = list(rows_TW.split(num_tokens))
        for item, item_TW in zip(self.items, rows, strict=True):
            if item.hook is not None:
                item.hook.enqueue(item_TW)
        return rows


@dataclass(frozen=True)
class LaunchedBatch:
    """A batch whose forward was launched.

    rows: of each item, on a GPU complete only once `end` has passed.
    started_at, returned_at: when `Batch.launch` began and returned, seconds of the monotonic clock.
    start, end: events around the forward on a GPU; None on a CPU.
    """

    rows: list[torch.Tensor]
    started_at: float
    returned_at: float
    start: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None

    def wait(self) -> float:
        """Waits for the rows; returns how long the forward took, seconds."""
        if self.start is None or self.end is None:
            return self.returned_at - self.started_at
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3
