"""Matrix products with what follows them: by cuBLAS and another kernel, or by one kernel where that is faster.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F

from gpu_kernels.gated_silu import gated_silu
from gpu_kernels.one_kernel import Activation, check_one_kernel, one_kernel, one_kernel_add
from gpu_kernels.timing import graphed_median_ms

_log = logging.getLogger(__name__)
_Work: TypeAlias = Callable[[torch.Tensor], object]

_PROBE_ROWS = (1024, 2048, 4096)
# Additions gain later: not at 4096 rows, but at 41,472 (docs/performance.md).
_ADD_PROBE_ROWS = (4096, 16384)
_PROBE_REPEATS = 15
# Less is not worth the time to compile it.
_WORTH_IT = 0.98


class Product:
    """activation(x W^T + b) in the weight's dtype.

    gelu_tanh: GELU by tanh. gated_silu: silu of the left half times the right half, [P, O / 2].
    """

    def __init__(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, activation: Activation | None = None
    ) -> None:
        self._weight_IO, self._bias_O, self._activation = weight_OI.t(), bias_O, activation
        self._one_kernel_from = _rows_for_one_kernel(
            weight_OI.shape, bias_O is not None, activation, weight_OI.dtype, weight_OI.device
        )

    def __call__(self, x_PI: torch.Tensor) -> torch.Tensor:
        by = one_kernel if len(x_PI) >= self._one_kernel_from else _by_cublas
        return by(x_PI, self._weight_IO, self._bias_O, self._activation)


class AddedProduct:
    """Adds x W^T to other rows, in place."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._weight_IO = weight_OI.t()
        self._one_kernel_from = _rows_for_one_kernel_add(weight_OI.shape, weight_OI.dtype, weight_OI.device)

    def __call__(self, to_PO: torch.Tensor, x_PI: torch.Tensor) -> None:
        by = one_kernel_add if len(x_PI) >= self._one_kernel_from else _add_by_cublas
        by(to_PO, x_PI, self._weight_IO)


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
def _rows_for_one_kernel(
    shape_OI: torch.Size, has_bias: bool, activation: Activation | None, dtype: torch.dtype, device: torch.device
) -> float:
    """From how many rows on one kernel is faster here: measured, and logged."""

    def make_works() -> tuple[_Work, _Work]:
        weight_IO = torch.randn(shape_OI, dtype=dtype, device=device).t()
        bias_O = torch.randn(shape_OI[0], dtype=dtype, device=device) if has_bias else None
        return (
            lambda x_PI: _by_cublas(x_PI, weight_IO, bias_O, activation),
            lambda x_PI: one_kernel(x_PI, weight_IO, bias_O, activation),
        )

    what = f"{shape_OI[1]} to {shape_OI[0]}" + (f" with {activation}" if activation else "")
    may = functools.partial(check_one_kernel, activation, has_bias, dtype, device)
    return _rows_where_faster(what, may, make_works, _PROBE_ROWS, shape_OI[1], dtype, device)


@functools.cache
def _rows_for_one_kernel_add(shape_OI: torch.Size, dtype: torch.dtype, device: torch.device) -> float:
    """See `_rows_for_one_kernel`."""

    def make_works() -> tuple[_Work, _Work]:
        weight_IO = torch.randn(shape_OI, dtype=dtype, device=device).t()
        to_PO = torch.zeros((max(_ADD_PROBE_ROWS), shape_OI[0]), dtype=dtype, device=device)
        return (
            lambda x_PI: _add_by_cublas(to_PO[: len(x_PI)], x_PI, weight_IO),
            lambda x_PI: one_kernel_add(to_PO[: len(x_PI)], x_PI, weight_IO),
        )

    may = functools.partial(check_one_kernel, None, False, dtype, device)
    what = f"{shape_OI[1]} to {shape_OI[0]}, added to rows"
    return _rows_where_faster(what, may, make_works, _ADD_PROBE_ROWS, shape_OI[1], dtype, device)


def _rows_where_faster(
    what: str,
    check: Callable[[], None],
    make_works: Callable[[], tuple[_Work, _Work]],
    probe_rows: Sequence[int],
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """
    Args:
        make_works: by cuBLAS and in one kernel.
    """
    if device.type == "cpu":
        return math.inf
    times: dict[int, tuple[float, float]] = {}
    try:
        check()
        usual, in_one_kernel = make_works()
        for num_rows in probe_rows:
            x_PI = torch.randn((num_rows, num_inputs), dtype=dtype, device=device)
            usual_ms, one_kernel_ms = (
                graphed_median_ms(functools.partial(work, x_PI), _PROBE_REPEATS) for work in (usual, in_one_kernel)
            )
            times[num_rows] = usual_ms, one_kernel_ms
    except Exception as error:  # it is here to be faster: without it the service runs as well
        _log.info("products of %s by cuBLAS: %s", what, error)
        return math.inf
    rows_from: float = math.inf
    for num_rows, (usual_ms, one_kernel_ms) in reversed(times.items()):
        if one_kernel_ms > _WORTH_IT * usual_ms:
            break
        rows_from = num_rows
    report = ", ".join(f"{rows} rows {usual:.3f} and {one:.3f} ms" for rows, (usual, one) in times.items())
    _log.info(
        "products of %s by cuBLAS and in one kernel: %s; so one kernel from %.0f rows on", what, report, rows_from
    )
    return rows_from
