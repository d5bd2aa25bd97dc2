"""CUDA graphs of a tower at a range of batch sizes, the capture sizes.

A graph is captured for each bucket; a batch replays that of the smallest bucket that it fits into. All graphs share one
memory pool and one set of input and output buffers, so only one may run at a time.

Shapes: P patches, X pixel values a patch, T tokens, W row width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables, Layouts, TableShape
from vitrine_vlm.encoder_service.gpu.layers import FusedTower
from vitrine_vlm.encoder_service.gpu.stats import GpuStats
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.encoder_service.models.layers import check_packed_shapes
from vitrine_vlm.gpu_kernels.graph_capture import CudaGraphs, Work

_SMALLEST_PATCHES = 256
_MULTIPLE = 64
# Ratio of neighbouring sizes: a batch pads by this much at worst. Large sizes are closer, as padding costs more there.
_STEP, _LARGE_STEP, _LARGE = 1.1, 1.02, 4096
# Attention's launch may grow with the longest segment allowed: images of up to 2 megapixels get buckets of their own.
_USUAL_LENGTH = 8192


@dataclass(frozen=True)
class Bucket:
    """Batches of at most `num_patches` whose tables fit into `shape`."""

    num_patches: int
    shape: TableShape

    def holds(self, layouts: Layouts) -> bool:
        return layouts.num_patches <= self.num_patches and layouts.fits(self.shape)


def capture_buckets(max_patches: int) -> list[Bucket]:
    """Buckets in ascending order up to `max_patches`; empty for 0.

    Empty segments cost attention launches without work, so each size has several buckets: for images, for a few large
    ones, and for many small ones or the frames of videos.
    """
    sizes: list[int] = []
    size = float(min(_SMALLEST_PATCHES, max_patches))
    while max_patches and (not sizes or sizes[-1] < max_patches):
        rounded = min(-(-int(size) // _MULTIPLE) * _MULTIPLE, max_patches)
        if not sizes or rounded > sizes[-1]:
            sizes.append(rounded)
        size *= _STEP if size < _LARGE else _LARGE_STEP
    buckets = []
    for size in sizes:
        usual = min(size, _USUAL_LENGTH)
        shapes = [(size // 512 + 8, usual), (8, size), (size // 32 + 8, usual)]
        if usual == size:
            shapes.remove((8, size))
        buckets += [Bucket(size, TableShape(frames, size // 32 + frames, longest)) for frames, longest in shapes]
    return buckets


class GpuTower:
    """A `VisionTower` that replays graphs. Not thread-safe: one forward at a time.

    capture_s: time the graphs took to capture, seconds.
    """

    def __init__(
        self,
        tower: FusedTower,
        max_graph_patches: int,
        on_progress: Callable[[int, int], None] = lambda num_captured, num_graphs: None,
    ) -> None:
        """Captures all buckets, which takes seconds.

        Args:
            max_graph_patches: larger batches run without a graph; 0 for no graphs at all.
            on_progress: called with (graphs captured, graphs in all) after each graph.
        """
        self._tower = tower
        self.out_hidden_size = tower.out_hidden_size
        self.deepstack_visual_indexes = tower.deepstack_visual_indexes
        self.row_width = tower.row_width
        self.merge_unit = tower.merge_unit
        self._num_replayed = self._num_eager = self._num_padding_patches = 0
        self._buckets = capture_buckets(max_graph_patches)
        self._graphs: dict[Bucket, Work] = {}
        started, capture = time.monotonic(), CudaGraphs(tower.device)
        device, dtype = tower.device, tower.dtype
        self._patches_PX = torch.zeros((max_graph_patches, tower.patch_width), dtype=dtype, device=device)
        self._rows_TW = torch.zeros(
            (max_graph_patches // tower.merge_unit, tower.row_width), dtype=dtype, device=device
        )
        largest_table = max((bucket.shape.size for bucket in self._buckets), default=0)
        self._table = torch.zeros(largest_table, dtype=torch.int32, device=device)
        # Largest first: the smaller graphs then reuse its memory.
        for bucket in reversed(self._buckets):
            self._graphs[bucket] = capture(self._work(bucket))
            on_progress(len(self._graphs), len(self._buckets))
        self._graph_nbytes = capture.nbytes  # buffers included
        self.capture_s = time.monotonic() - started

    def stats(self) -> GpuStats:
        return GpuStats(
            num_graphs=len(self._graphs),
            graph_nbytes=self._graph_nbytes,
            num_replayed=self._num_replayed,
            num_eager=self._num_eager,
            num_padding_patches=self._num_padding_patches,
        )

    @torch.inference_mode()
    def forward(self, patches_PX: torch.Tensor, grid_thw: list[GridTHW]) -> torch.Tensor:
        """See `VisionTower.forward`."""
        tower = self._tower
        check_packed_shapes(patches_PX, grid_thw, tower.merge_size, tower.patch_width)
        layouts = Layouts(grid_thw, tower.merge_size, tower.window_tokens)
        bucket = self._bucket(layouts)
        if bucket is None:
            return self._run_eagerly(patches_PX, layouts)
        self._num_replayed += 1
        self._num_padding_patches += bucket.num_patches - len(patches_PX)
        self._patches_PX[: len(patches_PX)].copy_(patches_PX, non_blocking=True)
        self._table[: bucket.shape.size].copy_(layouts.table(bucket.shape), non_blocking=True)
        self._graphs[bucket]()
        # A copy: the next batch overwrites the static rows.
        return self._rows_TW[: len(patches_PX) // self.merge_unit].clone()

    def bucket_of(self, grid_thw: list[GridTHW]) -> Bucket | None:
        """The bucket that a batch of these grids runs in; None if it runs without a graph."""
        return self._bucket(Layouts(grid_thw, self._tower.merge_size, self._tower.window_tokens))

    def _bucket(self, layouts: Layouts) -> Bucket | None:
        return next((bucket for bucket in self._buckets if bucket.holds(layouts)), None)

    def _run_eagerly(self, patches_PX: torch.Tensor, layouts: Layouts) -> torch.Tensor:
        self._num_eager += 1
        tower = self._tower
        num_tokens = layouts.num_patches // self.merge_unit
        rows_TW = torch.empty((num_tokens, self.row_width), dtype=tower.dtype, device=tower.device)
        table = layouts.table(layouts.shape).to(tower.device, non_blocking=True)
        tower.run(patches_PX.to(tower.device, tower.dtype), BatchTables.of(table, layouts.shape), rows_TW)
        return rows_TW

    def _work(self, bucket: Bucket) -> Work:
        patches_PX = self._patches_PX[: bucket.num_patches]
        rows_TW = self._rows_TW[: bucket.num_patches // self.merge_unit]
        return partial(self._tower.run, patches_PX, BatchTables.of(self._table, bucket.shape), rows_TW)
