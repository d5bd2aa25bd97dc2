"""One batch: its items packed, launched through the tower and waited for; on the batcher's threads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW

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


@dataclass(frozen=True, eq=False)
class Entry:
    """An item that wants its rows. deadline, queued_at, due: seconds of the monotonic clock."""

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
class Batch:
    """Items that run together. patches_PX: those of all, one after the other."""

    entries: list[Entry]
    patches_PX: torch.Tensor

    @classmethod
    def packed(cls, entries: list[Entry]) -> Batch:
        for entry in entries:
            if entry.patches_PX.is_cuda:
                # Made on another stream: not to be used again before what this thread launches has read it.
                entry.patches_PX.record_stream(torch.cuda.current_stream(entry.patches_PX.device))
        # Of different dtypes where images and videos come together on a GPU.
        patches = [entry.patches_PX for entry in entries]
        return cls(entries, torch.cat(patches) if len(patches) > 1 else patches[0])

    def launch(self, tower: VisionTower, device: torch.device) -> Launched:
        """Runs it through the tower, which is on `device`; on a GPU the work is only queued when this returns."""
        started = time.monotonic()
        if device.type == "cpu":
            rows = self._forward(tower)
            return Launched(rows, started, time.monotonic())
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            rows = self._forward(tower)
        except Exception:
            # Followers that were served already may still write, and are about to be told that they do not.
            torch.cuda.current_stream(device).synchronize()
            raise
        end.record()
        return Launched(rows, started, time.monotonic(), start, end)

    def end_followers(self) -> None:
        for entry in self.entries:
            if entry.follower is not None:
                entry.follower.batch_ended()

    def _forward(self, tower: VisionTower) -> list[torch.Tensor]:
        """Rows of each item, with what follows them queued behind."""
        rows_TW = tower.forward(self.patches_PX, [entry.grid_thw for entry in self.entries])
        num_tokens = [len(entry.patches_PX) // tower.merge_unit for entry in self.entries]
        rows = list(rows_TW.split(num_tokens))
        for entry, item_TW in zip(self.entries, rows, strict=True):
            if entry.follower is not None:
                entry.follower.follow(item_TW)
        return rows


@dataclass(frozen=True)
class Launched:
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
