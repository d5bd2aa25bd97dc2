"""Positions, attention segments and windows of the patches of packed grids.

A grid is (t, h, w) in patches. Patches come in merge-block order: frame by frame, the merge_size x merge_size patches
of one token next to each other, tokens in raster order.

Shapes: P patches of all images, T tokens (P / merge_size ** 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

GridTHW = tuple[int, int, int]


def patch_positions(grid_thw: Sequence[GridTHW], merge_size: int) -> torch.Tensor:
    """Row and column of every patch, [P, 2] int64 on the CPU; the same in all frames of a video."""
    return torch.cat([_frame_positions(h, w, merge_size).repeat(t, 1) for t, h, w in grid_thw])


def frame_cu_seqlens(grid_thw: Sequence[GridTHW]) -> torch.Tensor:
    """Attention segments, one a frame: bounds in patches, [num_frames + 1] int32 on the CPU."""
    frame_lengths = [h * w for t, h, w in grid_thw for _ in range(t)]
    return torch.tensor([0, *accumulate(frame_lengths)], dtype=torch.int32)


def window_order(grid_thw: Sequence[GridTHW], merge_size: int, window_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts tokens by attention window.

    Args:
        grid_thw: grids of the packed images.
        merge_size: patches merged into one token along each side.
        window_tokens: side of a window in tokens; windows at the right and lower border may be smaller.

    Returns:
        Token numbers in window order, [T] int64, and the windows' bounds in patches, [num_windows + 1] int32, both on
        the CPU.
    """
    orders: list[torch.Tensor] = []
    lengths: list[int] = []
    first_token = 0
    for t, h, w in grid_thw:
        num_rows, num_cols = h // merge_size, w // merge_size
        tokens = torch.arange(first_token, first_token + t * num_rows * num_cols).view(t, num_rows, num_cols)
        # Splitting leaves no empty window where the grid is an exact multiple of the window.
        for frame in tokens:
            for band in frame.split(window_tokens, dim=0):
                for window in band.split(window_tokens, dim=1):
                    orders.append(window.flatten())
                    lengths.append(window.numel() * merge_size**2)
        first_token += tokens.numel()
    return torch.cat(orders), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def interpolation_taps(grid_thw: Sequence[GridTHW], merge_size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples a square table of side * side entries bilinearly at every patch, with aligned corners.

    Returns:
        Table entries [P, 4] int64 and their weights [P, 4] float32, on the CPU.

    Source: transformers 5.23 `vision_utils.get_vision_interpolation_indices_and_weights`.
    """
    entries: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for t, h, w in grid_thw:
        positions_F2 = _frame_positions(h, w, merge_size)
        row_taps, row_weights = _axis_taps(positions_F2[:, 0], h, side)
        col_taps, col_weights = _axis_taps(positions_F2[:, 1], w, side)
        entries.append((row_taps[:, :, None] * side + col_taps[:, None, :]).flatten(1).repeat(t, 1))
        weights.append((row_weights[:, :, None] * col_weights[:, None, :]).flatten(1).repeat(t, 1))
    return torch.cat(entries), torch.cat(weights)


def _axis_taps(index: torch.Tensor, size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two table entries around each index of an axis of `size` patches, and their weights: [F, 2] each."""
    source = index.to(torch.float32) * (side - 1) / max(size - 1, 1)
    lower = source.floor()
    upper_weight = source - lower
    taps = torch.stack([lower, (lower + 1).clamp(max=side - 1)], dim=1).long()
    return taps, torch.stack([1 - upper_weight, upper_weight], dim=1)


def _frame_positions(h: int, w: int, merge_size: int) -> torch.Tensor:
    rows_HW, cols_HW = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    return torch.stack([axis.reshape(blocks).transpose(1, 2).flatten() for axis in (rows_HW, cols_HW)], dim=1)
