"""Skinny GEMMs: products of few rows, which read the weights once, at the speed of memory.

Shapes: T tokens, C input width, O output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch

# Numbers of rows that are supported; with more, the libraries' GEMMs are as fast.
SKINNY_ROWS = (1, 2, 4)
_OUTPUTS_A_PROGRAM, _INPUTS_A_STEP = 2, 2048


def skinny_linear(x_TC: torch.Tensor, weight_OC: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, [T, O], new memory; T is 1, 2 or 4."""
    out_TO = x_TC.new_empty((len(x_TC), len(weight_OC)))
    _launch(x_TC, weight_OC, weight_OC if bias_O is None else bias_O, out_TO, has_bias=bias_O is not None)
    return out_TO


def skinny_linear_add(x_TC: torch.Tensor, weight_OC: torch.Tensor, to_TO: torch.Tensor) -> None:
    """Adds the product to `to_TO` in place; T is 1, 2 or 4."""
    _launch(x_TC, weight_OC, weight_OC, to_TO, adds=True)


def skinny_gated_silu(x_TC: torch.Tensor, gate_up_weight: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), [T, O], new memory; T is 1, 2 or 4.

    Args:
        gate_up_weight: [2 * O, C], gate's rows first.
    """
    out_TO = x_TC.new_empty((len(x_TC), len(gate_up_weight) // 2))
    _launch(x_TC, gate_up_weight, gate_up_weight, out_TO, gated=True)
    return out_TO


def _launch(
    x_TC: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_TO: torch.Tensor,
    *,
    has_bias: bool = False,
    adds: bool = False,
    gated: bool = False,
) -> None:
    num_rows, width = x_TC.shape
    outputs = max(1, _OUTPUTS_A_PROGRAM // num_rows)
    pdl = has_dependent_launch(x_TC.device)
    _skinny_gemm[(triton.cdiv(out_TO.shape[1], outputs),)](
        x_TC, weight, bias, out_TO, out_TO.shape[1],
        WIDTH=width, ROWS=num_rows, OUTPUTS=outputs, INPUTS=_INPUTS_A_STEP,
        HAS_BIAS=has_bias, ADDS=adds, GATED=gated, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _skinny_gemm(
    x, weight, bias, out, num_outputs, WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
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
    total = values * factors.to(tl.float32)[None, :, :]
    total_up = total
    if GATED:
        total_up = values * up_factors.to(tl.float32)[None, :, :]
    for start in range(INPUTS, WIDTH, INPUTS):
        inside = (start + column < WIDTH)[None, :]
        factors = tl.load(at_weight + start, mask=real & inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_factors = tl.load(at_up + start, mask=real & inside, other=0.0, eviction_policy="evict_first")
        values = tl.load(at_x + start, mask=inside, other=0.0).to(tl.float32)[:, None, :]
        total += values * factors.to(tl.float32)[None, :, :]
        if GATED:
            total_up += values * up_factors.to(tl.float32)[None, :, :]
    result = tl.sum(total, 2)
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
        up = tl.sum(total_up, 2).to(dtype).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(at_out, result.to(dtype), mask=stored)
