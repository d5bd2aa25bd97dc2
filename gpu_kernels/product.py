"""Matrix products with what follows them: by cuBLAS and another kernel, or by one kernel where that is faster.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F

from gpu_kernels.fastest import FastestWays, fastest_ways
from gpu_kernels.gated_silu import gated_silu
from gpu_kernels.one_kernel import ALL_TILES, Activation, check_one_kernel, one_kernel, one_kernel_add

_log = logging.getLogger(__name__)
_Multiply: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Activation | None], torch.Tensor]
_Add: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
_Way = TypeVar("_Way")


class Product:
    """activation(x W^T + b) in the weight's dtype.

    gelu_tanh: GELU by tanh. gated_silu: silu of the left half times the right half, [P, O / 2].
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
            sizes: numbers of rows that will come, ascending: at each what is fastest is measured. By cuBLAS if empty.
        """
        self._weight_IO, self._bias_O, self._activation = weight_OI.t(), bias_O, activation
        self._ways = _ways_to_multiply(
            weight_OI.shape, bias_O is not None, activation, weight_OI.dtype, weight_OI.device, sizes
        )

    def __call__(self, x_PI: torch.Tensor) -> torch.Tensor:
        return self._ways.at(len(x_PI))(x_PI, self._weight_IO, self._bias_O, self._activation)


class AddedProduct:
    """Adds x W^T to other rows, in place."""

    def __init__(self, weight_OI: torch.Tensor, sizes: tuple[int, ...] = ()) -> None:
        """
        Args:
            sizes: see `Product`.
        """
        self._weight_IO = weight_OI.t()
        self._ways = _ways_to_add(weight_OI.shape, weight_OI.dtype, weight_OI.device, sizes)

    def __call__(self, to_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        self._ways.at(len(x_PI))(to_PO, x_PI, self._weight_IO)


def _by_cublas(
    x_PI: torch.Tensor, weight_IO: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation | None
) -> torch.Tensor:
    if activation == "gelu_tanh" and bias_O is not None and x_PI.is_cuda:  # on the CPU it has the exact GELU
        return torch._addmm_activation(bias_O, x_PI, weight_IO, use_gelu=True)
    product_PO = x_PI @ weight_IO if bias_O is None else torch.addmm(bias_O, x_PI, weight_IO)
    if activation == "gelu_tanh":
        return F.gelu(product_PO, approximate="tanh")
    return gated_silu(product_PO) if activation == "gated_silu" else product_PO


def _add_by_cublas(to_PO: torch.Tensor, x_PI: torch.Tensor, weight_IO: torch.Tensor) -> None:
    to_PO.addmm_(x_PI, weight_IO)


@functools.cache
def _ways_to_multiply(
    shape_OI: torch.Size,
    has_bias: bool,
    activation: Activation | None,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...],
) -> FastestWays[_Multiply]:
    def measured() -> FastestWays[_Multiply]:
        check_one_kernel(activation, has_bias, dtype, device)
        weight_IO = torch.randn(shape_OI, dtype=dtype, device=device).t()
        bias_O = torch.randn(shape_OI[0], dtype=dtype, device=device) if has_bias else None
        ways: dict[str, _Multiply] = {"cuBLAS": _by_cublas}
        ways |= {str(tiles): functools.partial(one_kernel, tiles) for tiles in ALL_TILES}

        def work(size: int) -> Callable[[_Multiply], object]:
            x_PI = torch.randn((size, shape_OI[1]), dtype=dtype, device=device)
            return lambda way: way(x_PI, weight_IO, bias_O, activation)

        return fastest_ways(what, ways, work, sizes)

    what = f"products of {shape_OI[1]} to {shape_OI[0]}" + (f" with {activation}" if activation else "")
    return _measured_or_usual(what, measured, _by_cublas, device, sizes)


@functools.cache
def _ways_to_add(
    shape_OI: torch.Size, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]
) -> FastestWays[_Add]:
    def measured() -> FastestWays[_Add]:
        check_one_kernel(None, False, dtype, device)
        weight_IO = torch.randn(shape_OI, dtype=dtype, device=device).t()
        ways: dict[str, _Add] = {"cuBLAS": _add_by_cublas, "one kernel": one_kernel_add}

        def work(size: int) -> Callable[[_Add], object]:
            x_PI = torch.randn((size, shape_OI[1]), dtype=dtype, device=device)
            to_PO = torch.zeros((size, shape_OI[0]), dtype=dtype, device=device)
            return lambda way: way(to_PO, x_PI, weight_IO)

        return fastest_ways(what, ways, work, sizes)

    what = f"products of {shape_OI[1]} to {shape_OI[0]}, added to rows"
    return _measured_or_usual(what, measured, _add_by_cublas, device, sizes)


def _measured_or_usual(
    what: str, measured: Callable[[], FastestWays[_Way]], usual: _Way, device: torch.device, sizes: tuple[int, ...]
) -> FastestWays[_Way]:
    if device.type != "cpu" and sizes:
        try:
            return measured()
        except Exception as error:  # it is here to be faster: without it the service runs as well
            _log.info("%s by cuBLAS: %s", what, error)
    return FastestWays((), [usual])
