"""Skinny GEMMs: products of few rows, which read the weights once, at the speed of memory.

Weights may be in FP8: they are converted in registers, and rows keep their dtype.

Shapes: T tokens, C input width, O output width.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight

# Numbers of rows that are supported; with more, the libraries' GEMMs are as fast.
SKINNY_ROWS = (1, 2, 4)
_OUTPUTS_A_PROGRAM, _INPUTS_A_STEP = 2, 2048

Weight: TypeAlias = torch.Tensor | Fp8Weight


def skinny_linear(
    x_TC: torch.Tensor, weight_OC: Weight, bias_O: torch.Tensor | None = None, outputs: int | None = None
) -> torch.Tensor:
    """x W^T + b, [T, O], new memory; T is 1, 2 or 4.

    Args:
        outputs: that a program computes of one row, and half or a quarter of that of more; None for the usual number.
    """
    out_TO = x_TC.new_empty((len(x_TC), len(_values(weight_OC))))
    _launch(x_TC, weight_OC, bias_O, out_TO, outputs)
    return out_TO


def skinny_linear_add(x_TC: torch.Tensor, weight_OC: Weight, to_TO: torch.Tensor, outputs: int | None = None) -> None:
    """Adds the product to `to_TO` in place; T is 1, 2 or 4."""
    _launch(x_TC, weight_OC, None, to_TO, outputs, adds=True)


def skinny_gated_silu(x_TC: torch.Tensor, gate_up_weight: Weight, outputs: int | None = None) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), [T, O], new memory; T is 1, 2 or 4.

    Args:
        gate_up_weight: [2 * O, C], gate's rows first.
    """
    out_TO = x_TC.new_empty((len(x_TC), len(_values(gate_up_weight)) // 2))
    _launch(x_TC, gate_up_weight, None, out_TO, outputs, gated=True)
    return out_TO


def _values(weight: Weight) -> torch.Tensor:
    return weight.values if isinstance(weight, Fp8Weight) else weight


def _launch(
    x_TC: torch.Tensor,
    weight_or_fp8: Weight,
    bias: torch.Tensor | None,
    out_TO: torch.Tensor,
    outputs_a_program: int | None,
    *,
    adds: bool = False,
    gated: bool = False,
) -> None:
    num_rows, width = x_TC.shape
    weight, scale, scales, block = _values(weight_or_fp8), x_TC, "none", (1, width)
    if isinstance(weight_or_fp8, Fp8Weight):
        scale, block = weight_or_fp8.scale, weight_or_fp8.block
        scales = "channel" if weight_or_fp8.is_per_channel else "block"
    outputs = max(1, (outputs_a_program or _OUTPUTS_A_PROGRAM) // num_rows)
    pdl = has_dependent_launch(x_TC.device)
    _skinny_gemm[(triton.cdiv(out_TO.shape[1], outputs),)](
        x_TC, weight, scale, weight if bias is None else bias, out_TO, out_TO.shape[1],
        WIDTH=width, ROWS=num_rows, OUTPUTS=outputs, INPUTS=_INPUTS_A_STEP,
        SCALES=scales, BLOCK_OUTPUTS=block[0], BLOCK_INPUTS=block[1],
        HAS_BIAS=bias is not None, ADDS=adds, GATED=gated, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _skinny_gemm(
    x, weight, scale, bias, out, num_outputs, WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, SCALES: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, column = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    at_weight = weight + output[:, None].to(tl.int64) * WIDTH + column[None, :]
    at_up = at_weight
    if GATED:
        at_up = at_weight + num_outputs.to(tl.int64) * WIDTH
    at_x = x + row[:, None] * WIDTH + column[None, :]
    real = (output < num_outputs)[:, None]
    loaded = real & (column < WIDTH)[None, :]
    # The first weights are loaded while the kernel in front still computes x.
    factors = tl.load(at_weight, mask=loaded, other=0.0, eviction_policy="evict_first")
    up_factors = factors
    if GATED:
        up_factors = tl.load(at_up, mask=loaded, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    values = tl.load(at_x, mask=(column < WIDTH)[None, :], other=0.0).to(tl.float32)[:, None, :]
    factors = factors.to(tl.float32)
    up_factors = up_factors.to(tl.float32)
    if SCALES == "block":
        factors = _scaled(factors, scale, output, num_outputs, 0, WIDTH, OUTPUTS, INPUTS, BLOCK_OUTPUTS, BLOCK_INPUTS)
        if GATED:
            up_factors = _scaled(
                up_factors, scale, num_outputs + output, 2 * num_outputs, 0,
                WIDTH, OUTPUTS, INPUTS, BLOCK_OUTPUTS, BLOCK_INPUTS,
            )  # fmt: skip
    total = values * factors[None, :, :]
    total_up = total
    if GATED:
        total_up = values * up_factors[None, :, :]
    for start in range(INPUTS, WIDTH, INPUTS):
        inside = (start + column < WIDTH)[None, :]
        factors = tl.load(at_weight + start, mask=real & inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_factors = tl.load(at_up + start, mask=real & inside, other=0.0, eviction_policy="evict_first")
        values = tl.load(at_x + start, mask=inside, other=0.0).to(tl.float32)[:, None, :]
        factors = factors.to(tl.float32)
        if SCALES == "block":
            factors = _scaled(
                factors, scale, output, num_outputs, start, WIDTH, OUTPUTS, INPUTS, BLOCK_OUTPUTS, BLOCK_INPUTS
            )
        total += values * factors[None, :, :]
        if GATED:
            up_factors = up_factors.to(tl.float32)
            if SCALES == "block":
                up_factors = _scaled(
                    up_factors, scale, num_outputs + output, 2 * num_outputs, start,
                    WIDTH, OUTPUTS, INPUTS, BLOCK_OUTPUTS, BLOCK_INPUTS,
                )  # fmt: skip
            total_up += values * up_factors[None, :, :]
    result = tl.sum(total, 2)
    result_up = result
    if GATED:
        result_up = tl.sum(total_up, 2)
    if SCALES == "channel":
        result *= tl.load(scale + output, mask=output < num_outputs, other=0.0)[None, :]
        if GATED:
            result_up *= tl.load(scale + num_outputs + output, mask=output < num_outputs, other=0.0)[None, :]
    at_out = out + row[:, None] * num_outputs + output[None, :]
    stored = (output < num_outputs)[None, :]
    dtype = out.dtype.element_ty
    if HAS_BIAS:
        result += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        result += tl.load(at_out, mask=stored, other=0.0).to(tl.float32)
    if GATED:
        # Rounded where the reference does.
        gate = result.to(dtype).to(tl.float32)
        up = result_up.to(dtype).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(at_out, result.to(dtype), mask=stored)


@triton.jit
def _scaled(
    factors, scale, output, stop, start, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """Multiplies [OUTPUTS, INPUTS] values of a weight from input `start` on with the scales of their blocks.

    A scale is loaded once for the inputs that share it: loads for each of them would take longer than the weights.
    """
    NUM_BLOCKS: tl.constexpr = (WIDTH + BLOCK_INPUTS - 1) // BLOCK_INPUTS
    block = start // BLOCK_INPUTS + tl.arange(0, INPUTS // BLOCK_INPUTS)
    at_scale = scale + (output // BLOCK_OUTPUTS)[:, None] * NUM_BLOCKS + block[None, :]
    scales = tl.load(at_scale, mask=(output < stop)[:, None] & (block < NUM_BLOCKS)[None, :], other=0.0)
    blocks = tl.reshape(factors, (OUTPUTS, INPUTS // BLOCK_INPUTS, BLOCK_INPUTS)) * scales[:, :, None]
    return tl.reshape(blocks, (OUTPUTS, INPUTS))
