"""Products with weights in FP8, by the implementation that measures fastest at each number of rows.

Few rows keep half precision (`skinny_gemm.py`, `fp8_gemm.py`), where the product is as fast as weights are read. More
are quantized by the kernel that makes them: norm, gated SiLU.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from vitrine_vlm.gpu_kernels import fp8, skinny_gemm
from vitrine_vlm.gpu_kernels.autotuner import Tuned, autotune
from vitrine_vlm.gpu_kernels.fp8 import Fp8Rows, Rows
from vitrine_vlm.gpu_kernels.fp8_gemm import FEW_ROWS, MANY_ROWS, Tile, fp8_gemm
from vitrine_vlm.gpu_kernels.fp8_weight import FP8, Fp8Weight
from vitrine_vlm.gpu_kernels.gated_silu import gated_silu

_log = logging.getLogger(__name__)

Epilogue: TypeAlias = Literal["none", "gated_silu", "add"]
# Products of more rows are bound by arithmetic, which is twice as fast in FP8.
_MOST_FEW_ROWS = 128
# More than the cache of any GPU so far.
_CACHE_NBYTES = 128 << 20
# As many as a large decoder has layers: smaller weights than fill the cache so stay in it in a decoder, too.
_MAX_WEIGHTS = 64
# cuBLAS's products with scales a block want rows in multiples of it.
_CUBLAS_ROWS = 4


class Gemm(ABC):
    """An implementation. takes_fp8: whether it takes `Fp8Rows`, and quantizes others first."""

    takes_fp8: bool

    @abstractmethod
    def multiply(self, x_PI: Rows, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b, [P, O]."""

    def gated(self, x_PI: Rows, weight_OI: Fp8Weight, *, quantized: bool) -> Rows:
        """silu of the left half of the product times its right half, [P, O / 2], in FP8 if `quantized`."""
        product_PO = self.multiply(x_PI, weight_OI, None)
        return fp8.quantized_gated_silu(product_PO) if quantized else gated_silu(product_PO)

    def add(self, to_PO: torch.Tensor, x_PI: Rows, weight_OI: Fp8Weight) -> tuple[torch.Tensor, ...]:
        """Adds the product to `to_PO`, or returns what the next norm has to add."""
        return (self.multiply(x_PI, weight_OI, None),)


@dataclass(frozen=True)
class Skinny(Gemm):
    """For `SKINNY_ROWS`, in half precision. outputs: see `skinny_linear`."""

    outputs: int | None = None
    takes_fp8 = False

    def multiply(self, x_PI: Rows, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
        return skinny_gemm.skinny_linear(_half(x_PI), weight_OI, bias_O, self.outputs)

    def gated(self, x_PI: Rows, weight_OI: Fp8Weight, *, quantized: bool) -> Rows:
        if quantized:
            return super().gated(x_PI, weight_OI, quantized=True)
        return skinny_gemm.skinny_gated_silu(_half(x_PI), weight_OI, self.outputs)

    def add(self, to_PO: torch.Tensor, x_PI: Rows, weight_OI: Fp8Weight) -> tuple[torch.Tensor, ...]:
        skinny_gemm.skinny_linear_add(_half(x_PI), weight_OI, to_PO, self.outputs)
        return ()


@dataclass(frozen=True)
class Tiled(Gemm):
    """`fp8_gemm`, of rows in half precision or in FP8; the result has the dtype `dtype`."""

    tile: Tile
    takes_fp8: bool
    dtype: torch.dtype = torch.bfloat16

    def multiply(self, x_PI: Rows, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
        out_SPO = self._parts(x_PI, weight_OI, bias_O)
        return out_SPO[0] if len(out_SPO) == 1 else out_SPO.sum(0)

    def add(self, to_PO: torch.Tensor, x_PI: Rows, weight_OI: Fp8Weight) -> tuple[torch.Tensor, ...]:
        return self._parts(x_PI, weight_OI, None).unbind()

    def _parts(self, x_PI: Rows, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
        x_PI = _in_fp8(x_PI) if self.takes_fp8 else _half(x_PI)
        return fp8_gemm(self.tile, x_PI, weight_OI, bias_O, self.dtype)


@dataclass(frozen=True)
class ScaledMm(Gemm):
    """torch's product of FP8 rows: CUTLASS's with scales a channel, cuBLAS's with scales a block."""

    dtype: torch.dtype = torch.bfloat16
    takes_fp8 = True

    def multiply(self, x_PI: Rows, weight_OI: Fp8Weight, bias_O: torch.Tensor | None) -> torch.Tensor:
        rows = _in_fp8(x_PI)
        if not weight_OI.is_per_channel:
            if len(rows.values) % _CUBLAS_ROWS:
                return fp8_gemm(MANY_ROWS[0], rows, weight_OI, bias_O, self.dtype)[0]
            # A row's scale once for each block of its inputs, which lie together for all rows.
            num_blocks = weight_OI.scale.shape[1]
            row_scale = rows.scale.t().expand(num_blocks, -1).contiguous().t()
            product_PO = _scaled_mm(rows.values, weight_OI.values, row_scale, weight_OI.scale.t(), None)
            product_PO = product_PO if bias_O is None else product_PO.add_(bias_O)
        else:
            scale_1O = weight_OI.scale.t().contiguous()  # a view: it has one column
            bias_O = None if bias_O is None else bias_O.to(torch.bfloat16)
            product_PO = _scaled_mm(rows.values, weight_OI.values, rows.scale, scale_1O, bias_O)
        return product_PO.to(self.dtype)


class Fp8Product:
    """Multiplies with a weight in FP8.

    The caller asks `takes_fp8` for the number of rows, and has them quantized by the kernel that makes them if so.
    """

    def __init__(
        self,
        weight_OI: Fp8Weight,
        bias_O: torch.Tensor | None = None,
        epilogue: Epilogue = "none",
        sizes: tuple[int, ...] = (),
        *,
        quantizes: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """
        Args:
            epilogue: which of the methods will be used.
            sizes: numbers of rows to autotune for, ascending; without any, the first implementation is used.
            quantizes: whether rows never come in FP8, so that quantizing them counts.
            dtype: of rows in half precision, and of results.
        """
        self._weight, self._bias = weight_OI, bias_O
        values = weight_OI.values
        self._tuned = _tuned(
            values.shape, weight_OI.block, bias_O is not None, epilogue, quantizes, dtype, values.device, sizes
        )

    def takes_fp8(self, num_rows: int) -> bool:
        return self._at(num_rows).takes_fp8

    def __call__(self, x_PI: Rows) -> torch.Tensor:
        return self._at(_num_rows(x_PI)).multiply(x_PI, self._weight, self._bias)

    def gated_silu(self, x_PI: Rows, *, quantized: bool) -> Rows:
        """See `Gemm.gated`."""
        return self._at(_num_rows(x_PI)).gated(x_PI, self._weight, quantized=quantized)

    def add_to(self, to_PO: torch.Tensor, x_PI: Rows) -> tuple[torch.Tensor, ...]:
        """See `Gemm.add`."""
        return self._at(_num_rows(x_PI)).add(to_PO, x_PI, self._weight)

    def _at(self, num_rows: int) -> Gemm:
        skinny, few, many = self._tuned
        if num_rows in skinny_gemm.SKINNY_ROWS:
            return skinny.at(num_rows)
        return (few if num_rows <= _MOST_FEW_ROWS else many).at(num_rows)


def _half(x_PI: Rows) -> torch.Tensor:
    assert isinstance(x_PI, torch.Tensor)
    return x_PI


def _in_fp8(x_PI: Rows) -> Fp8Rows:
    return x_PI if isinstance(x_PI, Fp8Rows) else fp8.quantized(x_PI.contiguous())


def _num_rows(x_PI: Rows) -> int:
    return len(x_PI.values if isinstance(x_PI, Fp8Rows) else x_PI)


def _scaled_mm(
    x_PI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> torch.Tensor:
    return torch._scaled_mm(
        x_PI, weight_OI.t(), scale_a=scale_a, scale_b=scale_b, bias=bias_O, out_dtype=torch.bfloat16,
        use_fast_accum=scale_b.shape[0] == 1,
    )  # fmt: skip


@functools.cache
def _tuned(
    shape_OI: torch.Size,
    block: tuple[int, int],
    has_bias: bool,
    epilogue: Epilogue,
    quantizes: bool,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...],
) -> tuple[Tuned[Gemm], Tuned[Gemm], Tuned[Gemm]]:
    """The implementations for `SKINNY_ROWS`, for other few rows and for many."""
    skinny: dict[str, Gemm] = {"skinny GEMM": Skinny(), "skinny GEMM of 4 outputs": Skinny(4)}
    few: dict[str, Gemm] = {f"{tile} of {dtype}".replace("torch.", ""): Tiled(tile, False, dtype) for tile in FEW_ROWS}
    many: dict[str, Gemm] = {f"{tile} of FP8": Tiled(tile, True, dtype) for tile in MANY_ROWS}
    torchs: dict[str, Gemm] = {"torch's": ScaledMm(dtype)}
    many = torchs | many if block[0] == 1 else many | torchs
    kinds = (skinny | few, few | many, many)
    if device.type == "cpu" or not sizes:
        first = [Tuned((), [next(iter(each.values()))]) for each in kinds]
        return first[0], first[1], first[2]
    outputs, inputs = shape_OI
    values = torch.randn(shape_OI, dtype=torch.bfloat16, device=device).to(FP8)
    scale = torch.rand((-(-outputs // block[0]), -(-inputs // block[1])), device=device)
    # One product after the other with weights of its own, as in a decoder: one weight would stay in the cache.
    num_weights = min(_MAX_WEIGHTS, -(-_CACHE_NBYTES // values.nbytes))
    weights = [Fp8Weight(values.clone(), scale, block) for _ in range(num_weights)]
    bias_O = torch.randn(outputs, dtype=dtype, device=device) if has_bias else None

    def work(size: int) -> Callable[[Gemm], object]:
        x_PI = torch.randn((size, inputs), dtype=dtype, device=device)
        rows, to_PO = fp8.quantized(x_PI), x_PI.new_zeros((size, outputs))
        read = weights if size <= _MOST_FEW_ROWS else weights[:1]

        def run(gemm: Gemm) -> None:
            x = rows if gemm.takes_fp8 and not quantizes else x_PI
            for weight in read:
                if epilogue == "gated_silu":
                    gemm.gated(x, weight, quantized=gemm.takes_fp8)
                elif epilogue == "add":
                    gemm.add(to_PO, x, weight)
                else:
                    gemm.multiply(x, weight, bias_O)

        return run

    what = f"FP8 products of {inputs} to {outputs}, blocks of {block[0]}x{block[1]}, {epilogue}"
    parts = [
        [size for size in sizes if size in skinny_gemm.SKINNY_ROWS],
        [size for size in sizes if size <= _MOST_FEW_ROWS and size not in skinny_gemm.SKINNY_ROWS],
        [size for size in sizes if size > _MOST_FEW_ROWS],
    ]
    tuned = [_tuned_part(what, each, work, part) for each, part in zip(kinds, parts, strict=True)]
    return tuned[0], tuned[1], tuned[2]


def _tuned_part(
    what: str, implementations: dict[str, Gemm], work: Callable[[int], Callable[[Gemm], object]], sizes: list[int]
) -> Tuned[Gemm]:
    if not sizes:
        return Tuned((), [next(iter(implementations.values()))])
    able: dict[str, Gemm] = {}
    for name, each in implementations.items():
        try:
            for size in (sizes[0], sizes[-1]):
                work(size)(each)
        except Exception as error:  # the others are used
            _log.info("%s: not by %s: %s", what, name, error)
        else:
            able[name] = each
    return autotune(what, able or implementations, work, sizes)
