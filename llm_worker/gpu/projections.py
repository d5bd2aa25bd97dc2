"""The products of a decoder's layer, with weights in half precision or in FP8.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.fp8_product import Epilogue, Fp8Product
from vitrine_vlm.gpu_kernels.product import Product
from vitrine_vlm.gpu_kernels.skinny_gemm import SKINNY_ROWS, skinny_gated_silu, skinny_linear, skinny_linear_add
from vitrine_vlm.llm_worker.models.fp8_linear import Fp8Linear, side_by_side


class Projection(Protocol):
    """Linear layers that are multiplied together."""

    def takes_fp8(self, num_rows: int) -> bool:
        """Whether so many rows are to come in FP8."""
        ...

    def __call__(self, x_PI: Rows) -> torch.Tensor:
        """x W^T + b, [P, O]."""
        ...

    def gated_silu(self, x_PI: Rows, *, quantized: bool) -> Rows:
        """silu of the left half of the product times its right half, [P, O / 2], in FP8 if `quantized`."""
        ...

    def add_to(self, to_PO: torch.Tensor, x_PI: Rows) -> tuple[torch.Tensor, ...]:
        """Adds the product in place, or returns what is left to be added."""
        ...


class HalfProjection:
    """With a weight in the rows' dtype."""

    def __init__(self, linears: list[nn.Linear], sizes: tuple[int, ...], epilogue: Epilogue) -> None:
        self._weight = _side_by_side(linears)
        biases: list[torch.Tensor] = [each.bias for each in linears if each.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        if epilogue == "gated_silu":
            # There are other kernels for few rows.
            sizes = tuple(size for size in sizes if size not in SKINNY_ROWS)
            self._gated = Product(self._weight, activation="gated_silu", sizes=sizes)

    def takes_fp8(self, num_rows: int) -> bool:
        return False

    def __call__(self, x_PI: Rows) -> torch.Tensor:
        assert isinstance(x_PI, torch.Tensor)
        linear = skinny_linear if len(x_PI) in SKINNY_ROWS else F.linear
        return linear(x_PI, self._weight, self._bias)

    def gated_silu(self, x_PI: Rows, *, quantized: bool) -> Rows:
        assert isinstance(x_PI, torch.Tensor) and not quantized
        return skinny_gated_silu(x_PI, self._weight) if len(x_PI) in SKINNY_ROWS else self._gated(x_PI)

    def add_to(self, to_PO: torch.Tensor, x_PI: Rows) -> tuple[torch.Tensor, ...]:
        assert isinstance(x_PI, torch.Tensor)
        if len(x_PI) in SKINNY_ROWS:
            skinny_linear_add(x_PI, self._weight, to_PO)
        else:
            to_PO.addmm_(x_PI, self._weight.t())
        return ()


def projection(
    linears: list[nn.Module],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    epilogue: Epilogue = "none",
    *,
    quantizes: bool = False,
) -> Projection:
    """Makes the projection of linear layers, which keep views of its weight.

    Args:
        linears: all `nn.Linear` or all `Fp8Linear`.
        dtype: of rows that are not in FP8, and of results.
        sizes: numbers of rows to autotune for, ascending.
        epilogue, quantizes: see `Fp8Product`.
    """
    in_fp8 = [each for each in linears if isinstance(each, Fp8Linear)]
    if not in_fp8:
        return HalfProjection([each for each in linears if isinstance(each, nn.Linear)], sizes, epilogue)
    assert len(in_fp8) == len(linears), "the loader dequantizes where only some of these are in FP8"
    biases = [each.bias for each in in_fp8 if each.bias is not None]
    bias = torch.cat(biases) if biases else None
    return Fp8Product(side_by_side(in_fp8), bias, epilogue, sizes, quantizes=quantizes, dtype=dtype)


def _side_by_side(linears: list[nn.Linear]) -> torch.Tensor:
    """Concatenates weights; the layers keep views of the result, so that nothing is in memory twice."""
    if len(linears) == 1:
        return linears[0].weight
    weight = torch.cat([each.weight for each in linears])
    parts = weight.split([each.out_features for each in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return weight
