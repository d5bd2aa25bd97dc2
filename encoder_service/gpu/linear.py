"""Linear layers with fused bias, activation or addition to the residual stream.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitrine_vlm.encoder_service.gpu.residual import ResidualStream
from vitrine_vlm.gpu_kernels import fp8
from vitrine_vlm.gpu_kernels.fp8 import Fp8Rows, Rows
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.gpu_kernels.fused_gemm import Activation
from vitrine_vlm.gpu_kernels.product import AddedProduct, Product


class Linear:
    """y = x W^T + b in the weight's dtype."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_IO = weight_OI.t()
        self._bias_O = bias_O

    def __call__(self, x_PI: torch.Tensor) -> torch.Tensor:
        if self._bias_O is None:
            return x_PI @ self._weight_IO
        return torch.addmm(self._bias_O, x_PI, self._weight_IO)

    def gelu(self, x_PI: torch.Tensor) -> torch.Tensor:
        """The product with an exact GELU behind it."""
        return F.gelu(self(x_PI))

    def into(self, out_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        """Writes the product into `out_PO`, which may be a slice of wider rows."""
        assert self._bias_O is not None
        torch.addmm(self._bias_O, x_PI, self._weight_IO, out=out_PO)


class BlockLinear:
    """A block's linear layer behind a norm, with its activation; see `Product`."""

    def __init__(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor, activation: Activation | None, sizes: tuple[int, ...]
    ) -> None:
        self._product = Product(weight_OI, bias_O, activation, sizes)

    def __call__(self, x_PI: Rows) -> Rows:
        assert isinstance(x_PI, torch.Tensor)
        return self._product(x_PI)


class ResidualLinear:
    """A block's linear layer into the residual stream, without its bias."""

    def __init__(self, weight_OI: torch.Tensor, sizes: tuple[int, ...]) -> None:
        self._product = AddedProduct(weight_OI, sizes)

    def add_to(self, stream: ResidualStream, x_PI: Rows) -> None:
        assert isinstance(x_PI, torch.Tensor)
        self._product(stream.x_PC, x_PI)


class Fp8BlockLinear:
    """`BlockLinear` in e4m3, one scale a row of x and of W. Rows in another dtype are quantized first.

    Without an activation the result is bfloat16, with one it is quantized again. Both widths must be multiples of 16.
    """

    def __init__(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, activation: Activation | None = None
    ) -> None:
        weight = Fp8Weight.of(weight_OI)
        self._weight_IO, self._scale_1O = weight.values.t(), weight.scale.t().contiguous()
        self._bias_O = None if bias_O is None else bias_O.to(torch.bfloat16)
        self._activation = activation

    def __call__(self, x_PI: Rows) -> Rows:
        product_PO = self.product(x_PI)
        if self._activation == "gelu_tanh":
            return fp8.quantized_gelu_tanh(product_PO)
        return fp8.quantized_gated_silu(product_PO) if self._activation == "gated_silu" else product_PO

    def product(self, x_PI: Rows) -> torch.Tensor:
        """[P, O] bfloat16, without the activation."""
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


class Fp8ResidualLinear:
    """`ResidualLinear` in e4m3; the next norm adds its product to the stream."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._linear = Fp8BlockLinear(weight_OI)

    def add_to(self, stream: ResidualStream, x_PI: Rows) -> None:
        stream.defer(self._linear.product(x_PI))


@dataclass(frozen=True)
class BlockLinears:
    """Makes the linear layers of a tower's blocks.

    fp8: whether they are in e4m3. sizes: numbers of patches to tune for, ascending; see `Product`.
    """

    fp8: bool = False
    sizes: tuple[int, ...] = ()

    def from_normed(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor, activation: Activation | None = None
    ) -> BlockLinear | Fp8BlockLinear:
        if self.fp8:
            return Fp8BlockLinear(weight_OI, bias_O, activation)
        return BlockLinear(weight_OI, bias_O, activation, self.sizes)

    def to_residual(self, weight_OI: torch.Tensor) -> ResidualLinear | Fp8ResidualLinear:
        return Fp8ResidualLinear(weight_OI) if self.fp8 else ResidualLinear(weight_OI, self.sizes)
