"""Weights in FP8 (e4m3) with a scale for each of their blocks. Needs no Triton.

Shapes: O outputs, I inputs, R and B rows and columns of the grid of scales; a weight of experts has a dim in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# A row of zeros needs a scale, too.
_SMALLEST_AMAX = 1e-12


@dataclass(frozen=True)
class Fp8Weight:
    """A weight that is its values times the scales of their blocks.

    values: [..., O, I] e4m3.
    scale: [..., R, B] float32, one for each block; the last blocks of a row or column may be cut.
    block: outputs and inputs of a block; of a weight with one scale an output channel 1 and at least I.
    """

    values: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]

    @classmethod
    def of(cls, weight_OI: torch.Tensor) -> Fp8Weight:
        """Quantizes a weight with one scale for each output channel."""
        scale = weight_OI.float().abs().amax(1, keepdim=True).clamp_min(_SMALLEST_AMAX) / FP8_MAX
        return cls((weight_OI.float() / scale).to(FP8), scale, (1, weight_OI.shape[1]))

    @property
    def is_per_channel(self) -> bool:
        return self.block[0] == 1 and self.scale.shape[-1] == 1

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Values times scales, computed in float32, as `dtype`; new memory."""
        rows, columns = self.block
        weight = self.values.float()
        scale_OB = self.scale if rows == 1 else self.scale.repeat_interleave(rows, -2)[..., : weight.shape[-2], :]
        # Block by block, as scales in the size of the weight would take as much memory again.
        for block in range(scale_OB.shape[-1]):
            weight[..., block * columns : (block + 1) * columns] *= scale_OB[..., block : block + 1]
        return weight.to(dtype)
