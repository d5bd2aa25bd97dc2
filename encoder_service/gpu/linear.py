"""Matrix products with what can be folded into them: bias, activation, adding to the residual stream.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from encoder_service.gpu import fp8, kernels
from encoder_service.gpu.fp8 import Fp8Rows, Rows
from encoder_service.gpu.residual import ResidualStream


class Linear:
    """y = x W^T + b in the weight's dtype."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_IO = weight_OI.t()
        self._bias_O = bias_O

    def __call__(self, x_PI: Rows) -> torch.Tensor:
        assert isinstance(x_PI, torch.Tensor)
        if self._bias_O is None:
            return x_PI @ self._weight_IO
        return torch.addmm(self._bias_O, x_PI, self._weight_IO)

    def gelu_tanh(self, x_PI: Rows) -> Rows:
        """GELU by tanh of the product, inside it."""
        assert self._bias_O is not None and isinstance(x_PI, torch.Tensor)
        return torch._addmm_activation(self._bias_O, x_PI, self._weight_IO, use_gelu=True)

    def gelu(self, x_PI: torch.Tensor) -> torch.Tensor:
        """Exact GELU of the product."""
        return F.gelu(self(x_PI))

    def gated_silu(self, x_PI: Rows) -> Rows:
        """silu of the product's left half times its right half, [P, O / 2]."""
        return kernels.gated_silu(self(x_PI))

    def add_to(self, stream: ResidualStream, x_PI: Rows) -> None:
        """Adds the product to the stream."""
        assert self._bias_O is None and isinstance(x_PI, torch.Tensor)
        stream.x_PC.addmm_(x_PI, self._weight_IO)

    def into(self, out_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        """Writes the product into `out_PO`, which may be a slice of wider rows."""
        assert self._bias_O is not None
        torch.addmm(self._bias_O, x_PI, self._weight_IO, out=out_PO)


class Fp8Linear:
    """y = x W^T + b in e4m3, one scale a row of x and of W; y in bfloat16. Rows in another dtype are quantized first.

    Both widths must be multiples of 16.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        weight = fp8.quantized_weight(weight_OI)
        self._weight_IO, self._scale_1O = weight.values.t(), weight.scale.t().contiguous()
        self._bias_O = None if bias_O is None else bias_O.to(torch.bfloat16)

    def __call__(self, x_PI: Rows) -> torch.Tensor:
        rows = x_PI if isinstance(x_PI, Fp8Rows) else fp8.quantized(x_PI)
        return torch._scaled_mm(
            rows.values,
            self._weight_IO,
            scale_a=rows.scale,
            scale_b=self._scale_1O,
            bias=self._bias_O,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def gelu_tanh(self, x_PI: Rows) -> Rows:
        """GELU by tanh of the product."""
        return fp8.quantized_gelu_tanh(self(x_PI))

    def gated_silu(self, x_PI: Rows) -> Rows:
        """silu of the product's left half times its right half, [P, O / 2]."""
        return fp8.quantized_gated_silu(self(x_PI))

    def add_to(self, stream: ResidualStream, x_PI: Rows) -> None:
        """Adds the product to the stream, at its next norm."""
        stream.owe(self(x_PI))


def block_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, fp8: bool) -> Linear | Fp8Linear:
    """One of a block's products."""
    return (Fp8Linear if fp8 else Linear)(weight_OI, bias_O)
