"""Fused epilogue GEMMs: a product and what follows it as one kernel, by quack-kernels on a Hopper GPU.

The activation takes results from registers, while the next tile is multiplied already.

Shapes: P rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Activation: TypeAlias = Literal["gelu_tanh", "gated_silu"]

_HOPPER = 9
_NAMES = {None: None, "gelu_tanh": "gelu_tanh_approx", "gated_silu": "swiglu"}


class Tiles(NamedTuple):
    """Of the result, in rows and outputs; neighbours of a cluster share what they read of the weight or of the rows."""

    rows: int
    outputs: int
    cluster_rows: int
    cluster_outputs: int

    def __str__(self) -> str:
        return f"tiles of {self.rows}x{self.outputs}, {self.cluster_rows}x{self.cluster_outputs} together"


# The best of some twenty at one size or another (docs/performance.md), and such as gated activations take, too.
ALL_TILES = (Tiles(128, 192, 2, 1), Tiles(128, 192, 1, 2), Tiles(192, 128, 1, 2))


class GemmWeights(NamedTuple):
    """The operands of activation(x W + b) that stay; see `of`.

    epilogue_bias_O: the bias in the order in which a fused epilogue sees the outputs: gate and up by turns if gated.
    """

    weight_IO: torch.Tensor
    bias_O: torch.Tensor | None
    activation: Activation | None
    epilogue_bias_O: torch.Tensor | None

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation | None) -> GemmWeights:
        """
        Args:
            weight_OI, bias_O: if gated, the gate's half first, then up's.
        """
        epilogue_bias_O = bias_O
        if bias_O is not None and activation == "gated_silu":
            epilogue_bias_O = bias_O.unflatten(0, (2, -1)).t().flatten()
        return cls(weight_OI.t(), bias_O, activation, epilogue_bias_O)


@functools.cache
def _quack() -> Any:
    """Raises ImportError where it is not installed."""
    import quack.cache
    import quack.gemm_interface
    import quack.gemm_runtime.identity

    # It would load machine code from a folder in /tmp that any user can write to.
    quack.cache.CACHE_ENABLED = False
    _identify_cutlass_by_name(quack.gemm_runtime.identity)
    return quack.gemm_interface


def _identify_cutlass_by_name(identity: Any) -> None:
    """Has epilogues compile wherever the packages are installed.

    quack-kernels 0.6 identifies an epilogue by the source of all that it refers to. It stops at functions of installed
    libraries, which it recognizes by a folder `site-packages` or `dist-packages` in their path. In any other folder
    (`pip install --target`) it goes on into CUTLASS, meets a ContextVar, and refuses every epilogue for want of a
    "fail-closed semantic key".
    """
    recognized = identity._is_extern_function

    def is_extern_function(function: Any) -> bool:
        module = getattr(function, "__module__", None) or ""
        return module.partition(".")[0] == "cutlass" or bool(recognized(function))

    identity._is_extern_function = is_extern_function


@functools.cache
def _config(tiles: Tiles) -> Any:
    return _quack().GemmConfig(
        tile_m=tiles.rows,
        tile_n=tiles.outputs,
        cluster_m=tiles.cluster_rows,
        cluster_n=tiles.cluster_outputs,
        pingpong=True,
        is_dynamic_persistent=False,
        device_capacity=_HOPPER,
    )


def check_fused_gemm(dtype: torch.dtype, device: torch.device) -> None:
    """
    Raises:
        ImportError: quack-kernels is not installed.
        ValueError: there are no fused GEMMs for this GPU or dtype.
    """
    _quack()
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        raise ValueError(f"its tiles are chosen for Hopper GPUs, not for {torch.cuda.get_device_name(device)}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"it is made for half precision, not for {dtype}")


def fused_gemm(tiles: Tiles, x_PI: torch.Tensor, weights: GemmWeights) -> torch.Tensor:
    """activation(x W + b), [P, O], or [P, O / 2] if it is gated; see `Product`. Check first."""
    _, out_PO = _quack().gemm_act(
        x_PI,
        weights.weight_IO,
        bias=weights.epilogue_bias_O,
        activation=_NAMES[weights.activation],
        store_preact=False,
        tuned=False,
        config=_config(tiles),
        # The weight's halves are read by turns; its memory stays as it is.
        concat_layout=("B",) if weights.activation == "gated_silu" else None,
    )
    assert isinstance(out_PO, torch.Tensor)
    return out_PO


def fused_gemm_add(to_PO: torch.Tensor, x_PI: torch.Tensor, weight_IO: torch.Tensor) -> None:
    """Adds x W to `to_PO`. Check first."""
    _quack().gemm_add_inplace(x_PI, weight_IO, to_PO, tuned=False)
