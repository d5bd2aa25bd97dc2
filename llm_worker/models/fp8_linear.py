"""A linear layer whose weight stays in FP8.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight


class Fp8Linear(nn.Module):
    """x W^T + b. In plain torch W is dequantized at each call; fused kernels take `fp8_weight`."""

    def __init__(self, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.values, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_OI.scale, requires_grad=False)
        self.block = weight_OI.block
        self.bias = bias_O

    @property
    def fp8_weight(self) -> Fp8Weight:
        return Fp8Weight(self.weight.data, self.weight_scale.data, self.block)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self.fp8_weight.dequantized(x_TI.dtype), self.bias)


def side_by_side(linears: list[Fp8Linear]) -> Fp8Weight:
    """Concatenates weights; the layers keep views of the result, so that nothing is in memory twice."""
    values = torch.cat([each.weight.data for each in linears])
    scale = torch.cat([each.weight_scale.data for each in linears])
    parts = values.split([len(each.weight) for each in linears])
    scale_parts = scale.split([len(each.weight_scale) for each in linears])
    for linear, part, scale_part in zip(linears, parts, scale_parts, strict=True):
        linear.weight.data, linear.weight_scale.data = part, scale_part
    return Fp8Weight(values, scale, linears[0].block)
