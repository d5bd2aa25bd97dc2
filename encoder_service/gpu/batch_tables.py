"""A batch's attention segments and windows, as tensors on the GPU.

Shapes: S attention segments (frames), N windows. A bucket is filled up with empty segments and windows at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from vitrine_vlm.encoder_service.models.grids import GridTHW


@dataclass(frozen=True)
class TableShape:
    """How much a table holds: `num_segments` of at most `max_seqlen` patches, and `num_windows`."""

    num_segments: int
    num_windows: int
    max_seqlen: int

    @property
    def size(self) -> int:
        """Number of int32 values in the table."""
        return self.num_segments + 1 + 2 * self.num_segments + self.num_windows + 1


@dataclass(frozen=True)
class BatchTables:
    """int32 tables on the GPU; bounds are in patches.

    cu_seqlens [S + 1], frame_hw [S, 2], window_cu_seqlens [N + 1]. max_seqlen: patches in a frame at most.
    """

    cu_seqlens: torch.Tensor
    frame_hw: torch.Tensor
    window_cu_seqlens: torch.Tensor
    max_seqlen: int

    @classmethod
    def of(cls, table: torch.Tensor, shape: TableShape) -> BatchTables:
        """Views of a table with the values of `Layouts.values` that was copied to the GPU."""
        bounds, sizes, windows = table[: shape.size].split(
            [shape.num_segments + 1, 2 * shape.num_segments, shape.num_windows + 1]
        )
        return cls(bounds, sizes.view(-1, 2), windows, shape.max_seqlen)


class Layouts:
    """Frames and windows of a batch's grids, on the host."""

    def __init__(self, grid_thw: list[GridTHW], merge_size: int, window_tokens: int) -> None:
        """
        Args:
            window_tokens: side of an attention window in tokens; 0 for a tower without windows.
        """
        self.frames = [(h, w) for t, h, w in grid_thw for _ in range(t)]
        self.frame_lengths = [h * w for h, w in self.frames]
        self.window_lengths: list[int] = []
        if window_tokens:
            for t, h, w in grid_thw:
                self.window_lengths += t * _window_lengths(h // merge_size, w // merge_size, merge_size, window_tokens)
        self.num_patches = sum(self.frame_lengths)
        # The capacity that this batch needs, no more.
        self.shape = TableShape(len(self.frames), len(self.window_lengths), max(self.frame_lengths))

    def fits(self, shape: TableShape) -> bool:
        return (
            self.shape.num_segments <= shape.num_segments
            and self.shape.num_windows <= shape.num_windows
            and self.shape.max_seqlen <= shape.max_seqlen
        )

    def values(self, shape: TableShape) -> list[int]:
        """The table of `shape.size` values: segment bounds, rows and columns of every frame, window bounds."""
        empty_frames = shape.num_segments - len(self.frames)
        empty_windows = shape.num_windows - len(self.window_lengths)
        bounds = [0, *accumulate(self.frame_lengths), *[self.num_patches] * empty_frames]
        sizes = [side for frame in self.frames for side in frame] + [1] * (2 * empty_frames)
        windows = [0, *accumulate(self.window_lengths)]
        return bounds + sizes + windows + windows[-1:] * empty_windows

    def table(self, shape: TableShape) -> torch.Tensor:
        """`values` in pinned memory, [shape.size] int32, for one asynchronous copy to the GPU."""
        return torch.tensor(self.values(shape), dtype=torch.int32).pin_memory()


def _window_lengths(num_rows: int, num_columns: int, merge_size: int, window_tokens: int) -> list[int]:
    """Patches of each window of a frame of tokens, bands from top to bottom; those at the border may be smaller."""
    heights = [min(window_tokens, num_rows - row) for row in range(0, num_rows, window_tokens)]
    widths = [min(window_tokens, num_columns - column) for column in range(0, num_columns, window_tokens)]
    return [height * width * merge_size**2 for height in heights for width in widths]
