"""Layer norm and RMS norm with fused additions to their input, into half-precision or FP8 rows.

One Triton kernel that reads nothing on the host, so all of it can be captured.

Shapes: P rows of a tower (patches), T tokens of a decoder, S attention segments, C width, n patches a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch
from vitrine_vlm.gpu_kernels.fp8 import Fp8Rows, Rows, store_fp8


def add_rms_norm(
    x_TC: torch.Tensor,
    added: tuple[torch.Tensor, ...],
    weight_C: torch.Tensor,
    eps: float,
    out_TC: torch.Tensor | None = None,
    *,
    fp8: bool = False,
) -> Rows:
    """Adds up to two tensors to `x` in place, and returns the RMS norm of the sum.

    Args:
        out_TC: where to write it; None for new memory, which is `Fp8Rows` if `fp8`.
    """
    num_tokens, width = x_TC.shape
    out: Rows = torch.empty_like(x_TC) if out_TC is None else out_TC
    if fp8:
        out = Fp8Rows.empty(num_tokens, width, x_TC.device)
    values, scales = (out.values, out.scale) if isinstance(out, Fp8Rows) else (out, out)
    first, second = (*added, x_TC, x_TC)[:2]
    block, pdl = triton.next_power_of_2(width), has_dependent_launch(x_TC.device)
    _norm_rows[(num_tokens,)](
        x_TC, first, second, x_TC, weight_C, weight_C, values, scales, num_tokens, x_TC, 0, eps,
        WIDTH=width, SHIFT_WIDTH=0, NUM_ADDED=len(added), ROUND_SUMS=True, LAYER_NORM=False, QUANTIZED=fp8, ROWS=1,
        BLOCK=block, PDL=pdl, num_warps=min(8, max(1, block // 512)), launch_pdl=pdl,
    )  # fmt: skip
    return out


def add_shifted_norm(
    x_PC: torch.Tensor,
    added_PC: torch.Tensor | None,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    eps: float,
    *,
    fp8: bool = False,
) -> Rows:
    """Layer norm of `x + added + shift`, or RMS norm without a bias; `x` becomes `x + added`, without the shift.

    Rows of padding become zero, whatever they held.

    Args:
        x_PC: [P, C]; the sum with `added_PC` replaces it.
        shift_C: [C] float32.
        weight, bias: [n * C]; n neighbouring rows of `x` are normalized as one row.
        cu_seqlens: [S + 1] int32; its last entry is the number of rows of `x` that are no padding.
        fp8: whether the result is `Fp8Rows`.

    Returns:
        [P / n, n * C], new memory.
    """
    width = len(weight)
    x = x_PC.view(-1, width)
    added = x if added_PC is None else added_PC
    out = Fp8Rows.empty(len(x), width, x.device) if fp8 else torch.empty_like(x)
    values, scales = (out.values, out.scale) if isinstance(out, Fp8Rows) else (out, out)
    # One warp for two rows of up to 2048 measured fastest: no exchange between warps, gains read once for both.
    block = triton.next_power_of_2(width)
    rows, pdl = 2 if block <= 2048 else 1, has_dependent_launch(x.device)
    _norm_rows[(triton.cdiv(len(x), rows),)](
        x, added, added, shift_C, weight, weight if bias is None else bias, values, scales, len(x), cu_seqlens,
        len(cu_seqlens) - 1, eps,
        WIDTH=width, SHIFT_WIDTH=len(shift_C), NUM_ADDED=int(added_PC is not None), ROUND_SUMS=False,
        LAYER_NORM=bias is not None, QUANTIZED=fp8, ROWS=rows, BLOCK=block, PDL=pdl,
        num_warps=max(1, block // 2048), launch_pdl=pdl,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows", "num_segments"])
def _norm_rows(
    x, first, second, shift, weight, bias, values, scales, num_rows, cu_seqlens, num_segments, eps,
    WIDTH: tl.constexpr, SHIFT_WIDTH: tl.constexpr, NUM_ADDED: tl.constexpr, ROUND_SUMS: tl.constexpr,
    LAYER_NORM: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # With a SHIFT_WIDTH of 0 there is no shift, and no row is padding.
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = index < WIDTH
    real = row < num_rows
    if SHIFT_WIDTH > 0:
        real = row < tl.load(cu_seqlens + num_segments) // (WIDTH // SHIFT_WIDTH)
    at = row.to(tl.int64) * WIDTH + index
    value = tl.load(x + at, mask=inside & real, other=0.0).to(tl.float32)
    if NUM_ADDED > 0:
        value = _sum(value, tl.load(first + at, mask=inside & real, other=0.0), ROUND_SUMS)
    if NUM_ADDED > 1:
        value = _sum(value, tl.load(second + at, mask=inside & real, other=0.0), ROUND_SUMS)
    if NUM_ADDED > 0:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=inside & real)
    if SHIFT_WIDTH > 0:
        value += tl.load(shift + index % SHIFT_WIDTH, mask=inside, other=0.0)
    gain = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    if LAYER_NORM:
        mean = tl.sum(value, 1)[:, None] / WIDTH
        centred = tl.where(inside, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / WIDTH + eps)
        normed = centred * scale * gain
        normed += tl.load(bias + index, mask=inside, other=0.0).to(tl.float32)
    else:
        scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / WIDTH + eps)
        # Rounded before the gain, as the reference does.
        normed = (value * scale).to(x.dtype.element_ty).to(tl.float32) * gain
    if SHIFT_WIDTH > 0:
        normed = tl.where(real & inside, normed, 0.0)
    stored = inside & (row < num_rows)
    if QUANTIZED:
        store_fp8(values, scales, row, at, normed, row < num_rows, stored)
    else:
        tl.store(values + at, normed.to(values.dtype.element_ty), mask=stored)


@triton.jit
def _sum(value, added, ROUNDED: tl.constexpr):
    total = value + added.to(tl.float32)
    if ROUNDED:  # as the reference does
        total = total.to(added.dtype).to(tl.float32)
    return total
