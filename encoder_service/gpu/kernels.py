"""Triton kernels for images: patches, their places, learned positions, attention within windows.

Every kernel takes packed rows, one a patch, of which only the first `cu_seqlens[-1]` belong to an image: the rest is
padding up to the size a graph was captured at. Nothing here reads anything on the host, so all of it can be captured.

Shapes: P patches with padding, S attention segments (frames), C hidden size, H heads, D head dim, E padded head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of `places`: row, column, rows and columns of the frame, the patch's number in merge-block order.
PLACE_WIDTH, SOURCE_COLUMN = 5, 4

_PATCHES_A_PROGRAM = 64


def image_patches(
    pixels_CHW: torch.Tensor,
    mean_C: torch.Tensor,
    std_C: torch.Tensor,
    patch_size: int,
    merge_size: int,
    repeats: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Patch rows of one image in merge-block order: rounded to 8 bits, normalized, cut.

    Args:
        pixels_CHW: float32 or uint8, 0 to 255, any strides; sides are multiples of patch_size * merge_size.
        mean_C, std_C: float32, of pixels from 0 to 255.
        repeats: number of frames in a row, all of them this image.

    Returns:
        [P, C * repeats * patch_size ** 2], `dtype`; a row runs over channel, frame, y, x.
    """
    channels, height, width = pixels_CHW.shape
    rows, columns = height // patch_size, width // patch_size
    row_width = channels * repeats * patch_size**2
    out = torch.empty((rows * columns, row_width), dtype=dtype, device=pixels_CHW.device)
    _image_patches[(len(out),)](
        pixels_CHW, mean_C, std_C, out, *pixels_CHW.stride(), columns,
        PATCH=patch_size, MERGE=merge_size, REPEATS=repeats, WIDTH=row_width, BLOCK=triton.next_power_of_2(row_width),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_c", "stride_h", "stride_w", "columns"])
def _image_patches(
    pixels, mean, std, out, stride_c, stride_h, stride_w, columns,
    PATCH: tl.constexpr, MERGE: tl.constexpr, REPEATS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    token, part = patch // (MERGE * MERGE), patch % (MERGE * MERGE)
    token_columns = columns // MERGE
    row = token // token_columns * MERGE + part // MERGE
    column = token % token_columns * MERGE + part % MERGE
    index = tl.arange(0, BLOCK)
    kept = index < WIDTH
    channel = index // (REPEATS * PATCH * PATCH)
    y, x = row * PATCH + index // PATCH % PATCH, column * PATCH + index % PATCH
    at = pixels + channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    value = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    # Rounded to the nearest grey level, halves up: rounding halves to even would need a call of its own.
    value = tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)
    value -= tl.load(mean + channel, mask=kept, other=0.0)
    value /= tl.load(std + channel, mask=kept, other=1.0)
    tl.store(out + patch.to(tl.int64) * WIDTH + index, value.to(out.dtype.element_ty), mask=kept)


def place_patches(
    cu_seqlens: torch.Tensor, frame_hw: torch.Tensor, merge_size: int, window_tokens: int, places: torch.Tensor
) -> None:
    """Computes the place of every patch in its frame from the grids.

    Args:
        cu_seqlens: [S + 1] int32, frame bounds in patches; empty frames at the end are allowed.
        frame_hw: [S, 2] int32, rows and columns of patches of each frame.
        window_tokens: side of an attention window in tokens, if patches are to be sorted by window; else 0.
        places: [P, 5] int32, filled with row, column, number of rows, number of columns, and the patch's number in
            merge-block order (its own number unless sorted by window). Padding: zeros, sizes of 1, its own number.
    """
    num_segments = len(frame_hw)
    grid = (triton.cdiv(len(places), _PATCHES_A_PROGRAM),)
    _place[grid](
        cu_seqlens, frame_hw, places, len(places), num_segments, num_segments.bit_length(), merge_size, window_tokens,
        BLOCK=_PATCHES_A_PROGRAM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_patches", "num_segments", "num_halvings"])
def _place(
    cu_seqlens, frame_hw, places, num_patches, num_segments, num_halvings, merge, window,
    BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = patch < tl.load(cu_seqlens + num_segments)
    # The last segment that begins at or before the patch.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_segments
    for _ in range(num_halvings):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= patch
        low = tl.where(before & (high - low > 1), middle, low)
        high = tl.where(before | (high - low <= 1), high, middle)
    first = tl.load(cu_seqlens + low)
    h = tl.where(real, tl.load(frame_hw + 2 * low), merge)
    w = tl.where(real, tl.load(frame_hw + 2 * low + 1), merge)
    local = tl.where(real, patch - first, 0)
    token, part = local // (merge * merge), local % (merge * merge)
    rows, columns = h // merge, w // merge
    token_row, token_column = token // columns, token % columns
    if window > 0:
        # Whole bands of windows come first, then whole windows of this band, then rows of this window.
        band = token // (window * columns)
        height = tl.minimum(window, rows - band * window)
        in_band = token - band * window * columns
        across = in_band // (height * window)
        width = tl.minimum(window, columns - across * window)
        in_window = in_band - across * height * window
        token_row = band * window + in_window // width
        token_column = across * window + in_window % width
    row, column = token_row * merge + part // merge, token_column * merge + part % merge
    source = (token_row * columns + token_column) * merge * merge + part
    stored = patch < num_patches
    at = places + patch * 5
    tl.store(at, tl.where(real, row, 0), mask=stored)
    tl.store(at + 1, tl.where(real, column, 0), mask=stored)
    tl.store(at + 2, tl.where(real, h, 1), mask=stored)
    tl.store(at + 3, tl.where(real, w, 1), mask=stored)
    tl.store(at + 4, tl.where(real, first + source, patch), mask=stored)


def add_position_embeddings(x_PC: torch.Tensor, table: torch.Tensor, places: torch.Tensor, side: int) -> None:
    """Adds the learned table, sampled bilinearly with aligned corners at every patch, to `x_PC` in place.

    Args:
        table: [side * side, C].

    Source: transformers 5.23 `vision_utils.get_vision_interpolation_indices_and_weights`.
    """
    num_channels = x_PC.shape[1]
    _add_positions[(len(x_PC),)](
        x_PC, table, places, num_channels, side, BLOCK=triton.next_power_of_2(num_channels), num_warps=4
    )


@triton.jit
def _add_positions(x, table, places, num_channels, side, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    at = places + patch * 5
    row_low, row_high, row_weight = _taps(tl.load(at), tl.load(at + 2), side)
    column_low, column_high, column_weight = _taps(tl.load(at + 1), tl.load(at + 3), side)
    channel = tl.arange(0, BLOCK)
    kept = channel < num_channels
    top = _entry(table, row_low * side + column_low, num_channels, channel, kept) * (1 - column_weight)
    top += _entry(table, row_low * side + column_high, num_channels, channel, kept) * column_weight
    bottom = _entry(table, row_high * side + column_low, num_channels, channel, kept) * (1 - column_weight)
    bottom += _entry(table, row_high * side + column_high, num_channels, channel, kept) * column_weight
    sampled = top * (1 - row_weight) + bottom * row_weight
    at_x = x + patch * num_channels + channel
    # Rounded before the sum, as the reference does.
    sampled = sampled.to(x.dtype.element_ty).to(tl.float32)
    tl.store(at_x, (tl.load(at_x, mask=kept).to(tl.float32) + sampled).to(x.dtype.element_ty), mask=kept)


@triton.jit
def _taps(index, size, side):
    source = tl.div_rn((index * (side - 1)).to(tl.float32), tl.maximum(size - 1, 1).to(tl.float32))
    low = tl.floor(source)
    return low.to(tl.int32), tl.minimum(low.to(tl.int32) + 1, side - 1), source - low


@triton.jit
def _entry(table, entry, num_channels, channel, kept):
    return tl.load(table + entry * num_channels + channel, mask=kept, other=0.0).to(tl.float32)


def window_attention(
    q_PHE: torch.Tensor, k_PHE: torch.Tensor, v_PHD: torch.Tensor, bounds: torch.Tensor, max_length: int, scale: float
) -> torch.Tensor:
    """Softmax attention within windows that fit into one tile.

    Args:
        bounds: [W + 1] int32, windows' bounds in patches; empty windows at the end are allowed.
        max_length: patches in a window at most.

    Returns:
        [P, H, D]; rows that belong to no window are not written.
    """
    num_patches, num_heads, head_dim = v_PHD.shape
    out = torch.empty((num_patches, num_heads, head_dim), dtype=v_PHD.dtype, device=v_PHD.device)
    _window_attention[(len(bounds) - 1, num_heads)](
        q_PHE, k_PHE, v_PHD, out, bounds, scale,
        q_PHE.stride(0), v_PHD.stride(0),
        HEAD_DIM=head_dim, PADDED=q_PHE.shape[-1], BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        LENGTH=max(16, triton.next_power_of_2(max_length)),
    )  # fmt: skip
    return out


@triton.jit
def _window_attention(
    q, k, v, out, bounds, scale, stride_q, stride_v,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    window, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(bounds + window)
    length = tl.load(bounds + window + 1) - first
    if length > 0:
        row = tl.arange(0, LENGTH)
        column = tl.arange(0, BLOCK_D)
        patch = (first + row).to(tl.int64)
        inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
        at = patch[:, None] * stride_q + head * PADDED + column[None, :]
        queries = tl.load(q + at, mask=inside, other=0.0)
        keys = tl.load(k + at, mask=inside, other=0.0)
        values = tl.load(v + patch[:, None] * stride_v + head * HEAD_DIM + column[None, :], mask=inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((row < length)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
        attended = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        at_out = (patch[:, None] * tl.num_programs(1) + head) * HEAD_DIM + column[None, :]
        tl.store(out + at_out, attended.to(out.dtype.element_ty), mask=inside)
