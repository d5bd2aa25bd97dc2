"""Triton kernels for the norms: of what a residual stream lacks, too, and into bfloat16 or FP8 rows.

Shapes: P patches with padding, S attention segments, C hidden size, n patches a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from encoder_service.gpu.fp8 import Fp8Rows, Rows, store_fp8
from encoder_service.gpu.residual import ResidualStream
from gpu_kernels.early_start import starts_early

EPS = 1e-6  # of every norm of both families


def layer_norm(
    stream: ResidualStream,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    fp8: bool = False,
) -> Rows:
    """Layer norm of `stream + shift`, new memory. Rows of padding become zero, whatever they were.

    Attention kernels load whole tiles, and a NaN in a row that is masked away would still spoil the sum. Attention
    leaves rows of padding unwritten; each norm ends what may have come of that.

    Args:
        stream: settled by this.
        shift_C: [C] float32: the biases that the stream still lacks.
        weight, bias: [n * C]; n patches are one row.
        cu_seqlens: [S + 1] int32; its last entry is the number of patches.

    Returns:
        [P / n, n * C]
    """
    return _norm(stream, shift_C, weight, bias, cu_seqlens, fp8)


def rms_norm(
    stream: ResidualStream,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    fp8: bool = False,
) -> Rows:
    """RMS norm of `stream + shift`; otherwise as `layer_norm`."""
    return _norm(stream, shift_C, weight, None, cu_seqlens, fp8)


def _norm(
    stream: ResidualStream,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    fp8: bool,
) -> Rows:
    owed_PC = stream.settle()
    width = len(weight)
    x = stream.x_PC.view(-1, width)
    out = Fp8Rows.empty(len(x), width, x.device) if fp8 else torch.empty_like(x)
    values, scales = (out.values, out.scale) if isinstance(out, Fp8Rows) else (out, out)
    # One warp for two rows of up to 2048 measured fastest: no exchange between warps, gains read once for both.
    block = triton.next_power_of_2(width)
    rows, early = 2 if block <= 2048 else 1, starts_early(x.device)
    _norm_rows[(triton.cdiv(len(x), rows),)](
        x, x if owed_PC is None else owed_PC, shift_C, weight, weight if bias is None else bias, values, scales,
        len(x), cu_seqlens, len(cu_seqlens) - 1, EPS,
        WIDTH=width, SHIFT_WIDTH=len(shift_C), OWED=owed_PC is not None, LAYER_NORM=bias is not None, QUANTIZED=fp8,
        ROWS=rows, BLOCK=block, EARLY=early, num_warps=max(1, block // 2048), launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows", "num_segments"])
def _norm_rows(
    x, owed, shift, weight, bias, values, scales, num_rows, cu_seqlens, num_segments, eps,
    WIDTH: tl.constexpr, SHIFT_WIDTH: tl.constexpr, OWED: tl.constexpr, LAYER_NORM: tl.constexpr,
    QUANTIZED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = index < WIDTH
    real = row < tl.load(cu_seqlens + num_segments) // (WIDTH // SHIFT_WIDTH)
    at = row.to(tl.int64) * WIDTH + index
    value = tl.load(x + at, mask=inside & real, other=0.0).to(tl.float32)
    if OWED:
        value += tl.load(owed + at, mask=inside & real, other=0.0).to(tl.float32)
        tl.store(x + at, value.to(x.dtype.element_ty), mask=inside & real)
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
    normed = tl.where(real & inside, normed, 0.0)
    stored = inside & (row < num_rows)
    if QUANTIZED:
        store_fp8(values, scales, row, at, normed, row < num_rows, stored)
    else:
        tl.store(values + at, normed.to(values.dtype.element_ty), mask=stored)
