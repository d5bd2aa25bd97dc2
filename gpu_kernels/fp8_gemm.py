"""GEMMs with weights in FP8: of half-precision rows, or of rows in FP8 with a scale each.

Half-precision rows are for few rows, where reading the weights takes most of the time: no kernel has to quantize rows
first. The weight is the left operand, so that rows pad to 16 instead of 64. Either the weights are converted in
registers, and nothing is rounded; or each step's part of a row becomes two parts in FP8, the second of what the first
leaves, which keep about the 8 bits of bfloat16, and the weights go to the tensor cores as they are.

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
# Of the second part: e4m3 rounds to a sixteenth at most.
_REST_UNIT = tl.constexpr(1 / 16)
# Tiles of rows that follow each other on the same outputs, so that the weights are read from the cache.
_GROUP = 8


class Tile(NamedTuple):
    """What a program computes: outputs x at most `rows` rows, in steps of `inputs`.

    splits: how many programs share the inputs of the same outputs.
    in_parts: whether half-precision rows become two parts in FP8.
    """

    outputs: int
    rows: int
    inputs: int
    num_warps: int
    num_stages: int
    splits: int = 1
    in_parts: bool = False

    def __str__(self) -> str:
        text = f"tiles of {self.outputs}x{self.rows} in steps of {self.inputs}"
        return (
            text
            + (f", inputs in {self.splits}" if self.splits > 1 else "")
            + (", rows in parts" if self.in_parts else "")
        )


# Of half-precision rows. The smaller one gives products to 4096 outputs a program for nearly each multiprocessor of an
# H200, and about 40 KB of weights in flight on each; a step is no longer than a block.
FEW_ROWS = (
    Tile(32, 64, 128, 4, 8),
    Tile(64, 64, 128, 4, 6),
    Tile(64, 32, 128, 4, 6, in_parts=True),
    Tile(64, 32, 128, 4, 6, splits=2, in_parts=True),
)
# Of rows in FP8.
MANY_ROWS = (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 4))


def fp8_gemm(
    tile: Tile,
    x_PI: Rows,
    weight_OI: Fp8Weight,
    bias_O: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x W^T + b, [S, P, O], new memory: a sum for each of the tile's `splits`, which the caller adds up.

    Args:
        weight_OI: with scales a channel, or blocks of `tile.inputs` inputs, and outputs that the tile's divide.
        dtype: of the result, where rows are in FP8; otherwise it is theirs.
    """
    quantized = isinstance(x_PI, Fp8Rows)
    values, row_scale = (x_PI.values, x_PI.scale) if isinstance(x_PI, Fp8Rows) else (x_PI, x_PI)
    (num_rows, width), num_outputs = values.shape, len(weight_OI.values)
    shape, dtype = (tile.splits, num_rows, num_outputs), dtype if quantized else values.dtype
    out_SPO = torch.empty(shape, dtype=dtype, device=values.device)
    rows = min(tile.rows, max(_FEWEST_ROWS, triton.next_power_of_2(num_rows)))
    pdl = has_dependent_launch(values.device)
    _fp8_gemm[(triton.cdiv(num_rows, rows) * triton.cdiv(num_outputs, tile.outputs), tile.splits)](
        values, row_scale, weight_OI.values, weight_OI.scale, row_scale if bias_O is None else bias_O, out_SPO,
        num_rows, num_outputs, WIDTH=width, ROWS=rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        QUANTIZED=quantized, IN_PARTS=tile.in_parts, BLOCKS=not weight_OI.is_per_channel,
        BLOCK_OUTPUTS=weight_OI.block[0], HAS_BIAS=bias_O is not None, GROUP=_GROUP, PDL=pdl,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out_SPO


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_gemm(
    x, row_scale, weight, weight_scale, bias, out, num_rows, num_outputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    QUANTIZED: tl.constexpr, IN_PARTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
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
    # Each split takes as many whole steps, the last one what is left.
    share = tl.cdiv(tl.cdiv(WIDTH, INPUTS), tl.num_programs(1)) * INPUTS
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, WIDTH), INPUTS):
        loaded, loaded_x = is_output[:, None], is_row[:, None]
        if WIDTH % INPUTS:
            inside = (start + column < WIDTH)[None, :]
            loaded, loaded_x = loaded & inside, loaded_x & inside
        factors = tl.load(at_weight + start, mask=loaded, other=0.0)
        values = tl.load(at_x + start, mask=loaded_x, other=0.0)
        if not QUANTIZED and not IN_PARTS:
            factors = factors.to(values.dtype)
        if BLOCKS:
            # A tile's outputs are in one block.
            block = output_tile * OUTPUTS // BLOCK_OUTPUTS * tl.cdiv(WIDTH, INPUTS) + start // INPUTS
            block_scale = tl.load(weight_scale + block)
        else:
            block_scale = 1.0
        if IN_PARTS:
            part, rest, scale = _in_two_parts(values.to(tl.float32), factors.dtype)
            product = tl.dot(factors, tl.trans(part)) + tl.dot(factors, tl.trans(rest)) * _REST_UNIT
            total += product * (scale * block_scale)[None, :]
        elif BLOCKS:
            total += tl.dot(factors, tl.trans(values), input_precision="ieee") * block_scale
        else:
            total = tl.dot(factors, tl.trans(values), total, input_precision="ieee")
    if not BLOCKS:
        total *= tl.load(weight_scale + output, mask=is_output, other=0.0)[:, None]
    if QUANTIZED:
        total *= tl.load(row_scale + row, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS and tl.program_id(1) == 0:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    at_out = out + (tl.program_id(1) * num_rows + row).to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(at_out, tl.trans(total).to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _in_two_parts(value, dtype: tl.constexpr):
    """Returns two tensors in FP8 and a scale of each row, with value = (first + second * _REST_UNIT) * scale."""
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / 448.0
    value /= scale[:, None]
    first = value.to(dtype)
    return first, ((value - first.to(tl.float32)) / _REST_UNIT).to(dtype), scale
