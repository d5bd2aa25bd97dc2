"""Linear layers with an activation or addition: by cuBLAS and another kernel, or by a fused epilogue GEMM if faster.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F

from vitrine_vlm.gpu_kernels.autotuner import Tuned, autotune
from vitrine_vlm.gpu_kernels.fused_gemm import (
    ALL_TILES,
    Activation,
    GemmWeights,
    check_fused_gemm,
    fused_gemm,
    fused_gemm_add,
)
from vitrine_vlm.gpu_kernels.gated_silu import gated_silu

_log = logging.getLogger(__name__)
_Multiply: TypeAlias = Callable[[torch.Tensor, GemmWeights], torch.Tensor]
_Add: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
_Implementation = TypeVar("_Implementation")


class Product:
    """Computes activation(x W^T + b) in the weight's dtype.

    The activation gelu_tanh is the tanh GELU; gated_silu is silu of the left half times the right half, [P, O / 2].
    """

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        activation: Activation | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        """
        Args:
            sizes: numbers of rows to autotune for, ascending; without any, cuBLAS is used.
        """
        self._weights = GemmWeights.of(weight_OI, bias_O, activation)
        self._tuned = _tuned_multiply(
            weight_OI.shape, bias_O is not None, activation, weight_OI.dtype, weight_OI.device, sizes
        )

    def __call__(self, x_PI: torch.Tensor) -> torch.Tensor:
        return self._tuned.at(len(x_PI))(x_PI, self._weights)


class AddedProduct:
    """Adds x W^T to other rows, in place."""

    def __init__(self, weight_OI: torch.Tensor, sizes: tuple[int, ...] = ()) -> None:
        """
        Args:
            sizes: see `Product`.
        """
        self._weight_IO = weight_OI.t()
        self._tuned = _tuned_add(weight_OI.shape, weight_OI.dtype, weight_OI.device, sizes)

    def __call__(self, to_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        self._tuned.at(len(x_PI))(to_PO, x_PI, self._weight_IO)


def _by_cublas(x_PI: torch.Tensor, weights: GemmWeights) -> torch.Tensor:
    weight_IO, bias_O, activation, _ = weights
    # On a CPU torch's fused function computes the exact GELU.
    if activation == "gelu_tanh" and bias_O is not None and x_PI.is_cuda:
        return torch._addmm_activation(bias_O, x_PI, weight_IO, use_gelu=True)
    product_PO = x_PI @ weight_IO if bias_O is None else torch.addmm(bias_O, x_PI, weight_IO)
    if activation == "gelu_tanh":
        return F.gelu(product_PO, approximate="tanh")
    return gated_silu(product_PO) if activation == "gated_silu" else product_PO


def _add_by_cublas(to_PO: torch.Tensor, x_PI: torch.Tensor, weight_IO: torch.Tensor) -> None:
    to_PO.addmm_(x_PI, weight_IO)


@functools.cache
def _tuned_multiply(
    shape_OI: torch.Size,
    has_bias: bool,
    activation: Activation | None,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...],
) -> Tuned[_Multiply]:
    def measured() -> Tuned[_Multiply]:
        check_fused_gemm(dtype, device)
        bias_O = torch.randn(shape_OI[0], dtype=dtype, device=device) if has_bias else None
        weights = GemmWeights.of(torch.randn(shape_OI, dtype=dtype, device=device), bias_O, activation)
        implementations: dict[str, _Multiply] = {"cuBLAS": _by_cublas}
        implementations |= {str(tiles): functools.partial(fused_gemm, tiles) for tiles in ALL_TILES}

        def work(size: int) -> Callable[[_Multiply], object]:
            x_PI = torch.randn((size, shape_OI[1]), dtype=dtype, device=device)
            return lambda multiply: multiply(x_PI, weights)

        return autotune(what, implementations, work, sizes)

    what = f"products of {shape_OI[1]} to {shape_OI[0]}" + (f" with {activation}" if activation else "")
    return _measured_or_default(what, measured, _by_cublas, device, sizes)


@functools.cache
def _tuned_add(shape_OI: torch.Size, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> Tuned[_Add]:
    def measured() -> Tuned[_Add]:
        check_fused_gemm(dtype, device)
        weight_IO = torch.randn(shape_OI, dtype=dtype, device=device).t()
        implementations: dict[str, _Add] = {"cuBLAS": _add_by_cublas, "fused epilogue": fused_gemm_add}

        def work(size: int) -> Callable[[_Add], object]:
            x_PI = torch.randn((size, shape_OI[1]), dtype=dtype, device=device)
            to_PO = torch.zeros((size, shape_OI[0]), dtype=dtype, device=device)
            return lambda add: add(to_PO, x_PI, weight_IO)

        return autotune(what, implementations, work, sizes)

    what = f"products of {shape_OI[1]} to {shape_OI[0]}, added to rows"
    return _measured_or_default(what, measured, _add_by_cublas, device, sizes)


def _measured_or_default(
    what: str,
    measured: Callable[[], Tuned[_Implementation]],
    default: _Implementation,
    device: torch.device,
    sizes: tuple[int, ...],
) -> Tuned[_Implementation]:
    if device.type != "cpu" and sizes:
        try:
            return measured()
        except Exception as error:  # a fused GEMM is only faster: the service runs without it
            _log.info("%s by cuBLAS: %s", what, error)
    return Tuned((), [default])
