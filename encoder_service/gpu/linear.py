"""Matrix products with what can be folded into them: bias, GELU, adding to the residual stream.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Linear:
    """y = x W^T + b in the weight's dtype."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_IO = weight_OI.t()
        self._bias_O = bias_O

    def __call__(self, x_PI: torch.Tensor) -> torch.Tensor:
        if self._bias_O is None:
            return x_PI @ self._weight_IO
        return torch.addmm(self._bias_O, x_PI, self._weight_IO)

    def gelu_tanh(self, x_PI: torch.Tensor) -> torch.Tensor:
        """GELU by tanh of the product, inside it."""
        assert self._bias_O is not None
        return torch._addmm_activation(self._bias_O, x_PI, self._weight_IO, use_gelu=True)

    def gelu(self, x_PI: torch.Tensor) -> torch.Tensor:
        """Exact GELU of the product."""
        return F.gelu(self(x_PI))

    def add_to(self, y_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        """Adds x W^T to `y_PO` in place. The bias is left out: see `Residual biases` in layers.py."""
        y_PO.addmm_(x_PI, self._weight_IO)

    def into(self, out_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        """Writes the product into `out_PO`, which may be a slice of wider rows."""
        assert self._bias_O is not None
        torch.addmm(self._bias_O, x_PI, self._weight_IO, out=out_PO)
