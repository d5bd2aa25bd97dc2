"""Rows in FP8 (e4m3) with one dynamic scale each, and the kernels that quantize them.

Shapes: P rows, C values a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from vitrine_vlm.gpu_kernels.fp8_weight import FP8


@dataclass(frozen=True)
class Fp8Rows:
    """values: [P, C] e4m3; scale: [P, 1] float32. A row is its values times its scale."""

    values: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> Fp8Rows:
        return cls(
            torch.empty((num_rows, width), dtype=FP8, device=device),
            torch.empty((num_rows, 1), dtype=torch.float32, device=device),
        )

    def to_float(self) -> torch.Tensor:
        """[P, C] float32."""
        return self.values.float() * self.scale


Rows: TypeAlias = torch.Tensor | Fp8Rows


@triton.jit
def store_fp8(values, scales, row, at, value, stored_row, stored):
    """Stores rows of `value`, each scaled so that its largest magnitude is e4m3's; `value` is 0 outside a row."""
    scale = tl.maximum(tl.max(tl.abs(value), 1)[:, None], 1e-12) / 448.0
    tl.store(scales + row, scale, mask=stored_row)
    tl.store(values + at, (value / scale).to(values.dtype.element_ty), mask=stored)


def quantized(x_PC: torch.Tensor) -> Fp8Rows:
    """Quantizes contiguous rows."""
    return _quantized(x_PC, "none")


def quantized_gelu_tanh(x_PC: torch.Tensor) -> Fp8Rows:
    """Quantizes the tanh GELU of contiguous rows."""
    return _quantized(x_PC, "gelu_tanh")


def quantized_gated_silu(gate_up: torch.Tensor) -> Fp8Rows:
    """Quantizes silu(gate) * up of rows [P, 2 * C] that hold gate and up side by side."""
    return _quantized(gate_up, "gated_silu")


def _quantized(x: torch.Tensor, activation: str) -> Fp8Rows:
    num_rows, width_in = x.shape
    width = width_in // 2 if activation == "gated_silu" else width_in
    out = Fp8Rows.empty(num_rows, width, x.device)
    block = triton.next_power_of_2(width)
    _quantize[(num_rows,)](
        x, out.values, out.scale, WIDTH_IN=width_in, WIDTH=width, ACTIVATION=activation, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _quantize(
    x, values, scales, WIDTH_IN: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = index < WIDTH
    value = tl.load(x + row * WIDTH_IN + index, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu_tanh":
        # tanh(a) is 2 sigmoid(2a) - 1, and the factor is twice the root of 2 / pi.
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    if ACTIVATION == "gated_silu":
        up = tl.load(x + row * WIDTH_IN + WIDTH + index, mask=inside, other=0.0).to(tl.float32)
        value = value * tl.sigmoid(value) * up
    store_fp8(values, scales, row, row * WIDTH + index, value, row >= 0, inside)
