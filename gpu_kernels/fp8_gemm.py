"""GEMMs with weights in FP8: of half-precision rows, or of rows in FP8 with a scale each.

With half-precision rows the weights are converted in registers. That is for few rows, where reading the weights takes
most of the time: nothing is rounded, and no kernel has to quantize rows first. The weight is the left operand, which
tensor cores read from registers, and the rows pad to 16 instead of 64.

With scales a block, a step of the loop is one block: its part of the sum is scaled in float32, as in DeepSeek-V3
(arXiv 2412.19437, section 3.3.2), but rows have one scale each.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch
from vitrine_vlm.gpu_kernels.fp8 import Fp8Rows, Rows
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight

_FEWEST_ROWS = 16  # of a tensor core's operand
# Tiles of rows that follow each other on the same outputs, so that the weights are read from the cache.
_GROUP = 8


class Tile(NamedTuple):
    """What a program computes: outputs x at most `rows` rows, in steps of `inputs`."""

    outputs: int
    rows: int
    inputs: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"tiles of {self.outputs}x{self.rows} in steps of {self.inputs}"


# Of half-precision rows. The smaller one gives products to 4096 outputs a program for nearly each multiprocessor of an
# H200, and about 40 KB of weights in flight on each; a step is no longer than a block.
FEW_ROWS = (Tile(32, 64, 128, 4, 8), Tile(64, 64, 128, 4, 6))
# Of rows in FP8.
MANY_ROWS = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 4))


def fp8_gemm(
    tile: Tile,
    x_PI: Rows,
    weight_OI: Fp8Weight,
    bias_O: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x W^T + b, [P, O], new memory.

    Args:
        weight_OI: with scales a channel, or blocks of `tile.inputs` inputs, and outputs that the tile's divide.
        dtype: of the result, where rows are in FP8; otherwise it is theirs.
    """
    quantized = isinstance(x_PI, Fp8Rows)
    values, row_scale = (x_PI.values, x_PI.scale) if isinstance(x_PI, Fp8Rows) else (x_PI, x_PI)
    (num_rows, width), num_outputs = values.shape, len(weight_OI.values)
    out_PO = torch.empty((num_rows, num_outputs), dtype=dtype if quantized else values.dtype, device=values.device)
    rows = min(tile.rows, max(_FEWEST_ROWS, triton.next_power_of_2(num_rows)))
    pdl = has_dependent_launch(values.device)
    _fp8_gemm[(triton.cdiv(num_rows, rows) * triton.cdiv(num_outputs, tile.outputs),)](
        values, row_scale, weight_OI.values, weight_OI.scale, row_scale if bias_O is None else bias_O, out_PO,
        num_rows, num_outputs, WIDTH=width, ROWS=rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        QUANTIZED=quantized, BLOCKS=not weight_OI.is_per_channel, BLOCK_OUTPUTS=weight_OI.block[0],
        HAS_BIAS=bias_O is not None, GROUP=_GROUP, PDL=pdl,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out_PO


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_gemm(
    x, row_scale, weight, weight_scale, bias, out, num_rows, num_outputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    QUANTIZED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    # Neighbouring programs have the same outputs and other rows, GROUP tiles of outputs by turns.
    num_row_tiles, num_output_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_outputs, OUTPUTS)
    group = tl.program_id(0) // (GROUP * num_row_tiles)
    group_size = tl.minimum(num_output_tiles - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * num_row_tiles)
    output_tile, row_tile = group * GROUP + place % group_size, place // group_size
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, INPUTS)
    at_weight = weight + output.to(tl.int64)[:, None] * WIDTH + column[None, :]
    at_x = x + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    is_output, is_row = output < num_outputs, row < num_rows
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, WIDTH, INPUTS):
        loaded, loaded_x = is_output[:, None], is_row[:, None]
        if WIDTH % INPUTS:
            inside = (start + column < WIDTH)[None, :]
            loaded, loaded_x = loaded & inside, loaded_x & inside
        factors = tl.load(at_weight + start, mask=loaded, other=0.0)
        values = tl.load(at_x + start, mask=loaded_x, other=0.0)
        if not QUANTIZED:
            factors = factors.to(values.dtype)
        if BLOCKS:
            # A tile's outputs are in one block.
            block = output_tile * OUTPUTS // BLOCK_OUTPUTS * tl.cdiv(WIDTH, INPUTS) + start // INPUTS
            product = tl.dot(factors, tl.trans(values), input_precision="ieee")
            total += product * tl.load(weight_scale + block)
        else:
            total = tl.dot(factors, tl.trans(values), total, input_precision="ieee")
    if not BLOCKS:
        total *= tl.load(weight_scale + output, mask=is_output, other=0.0)[:, None]
    if QUANTIZED:
        total *= tl.load(row_scale + row, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    at_out = out + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(at_out, tl.trans(total).to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
