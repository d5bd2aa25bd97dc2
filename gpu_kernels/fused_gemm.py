"""Fused epilogue GEMMs: a product and its bias, activation or addition as one kernel, by quack-kernels on a Hopper GPU.

The activation reads results from registers, while the next tile is multiplied already.

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
    """A tile's rows and outputs, and how many tiles form a cluster, which shares what it reads of the operands."""

    rows: int
    outputs: int
    cluster_rows: int
    cluster_outputs: int

    def __str__(self) -> str:
        return f"tiles of {self.rows}x{self.outputs}, {self.cluster_rows}x{self.cluster_outputs} together"


# The fastest of some twenty at some size (docs/performance.md); all of them support gated activations, too.
ALL_TILES = (Tiles(128, 192, 2, 1), Tiles(128, 192, 1, 2), Tiles(192, 128, 1, 2))


class GemmWeights(NamedTuple):
    """The constant operands of activation(x W + b); see `of`.

    epilogue_bias_O: the bias in the order of a fused epilogue's outputs: gate and up interleaved if gated.
    """

    weight_IO: torch.Tensor
    bias_O: torch.Tensor | None
    activation: Activation | None
    epilogue_bias_O: torch.Tensor | None

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation | None) -> GemmWeights:
        """Prepares the operands.

        Args:
            weight_OI, bias_O: if gated, the gate's half first, then up's.
        """
        epilogue_bias_O = bias_O
        if bias_O is not None and activation == "gated_silu":
            epilogue_bias_O = bias_O.unflatten(0, (2, -1)).t().flatten()
        return cls(weight_OI.t(), bias_O, activation, epilogue_bias_O)


@functools.cache
def _quack() -> Any:
    """quack-kernels' interface; raises ImportError where it is not installed."""
    import quack.cache
    import quack.gemm_interface
    import quack.gemm_runtime.identity

    # Its cache would load machine code from a folder in /tmp that any user can write to.
    quack.cache.CACHE_ENABLED = False
    _identify_cutlass_by_name(quack.gemm_runtime.identity)
    return quack.gemm_interface


def _identify_cutlass_by_name(identity: Any) -> None:
    """Makes epilogues compile wherever the packages are installed.

    quack-kernels 0.6 identifies an epilogue by the source of all functions that it refers to, except those of installed
    libraries, which it recognizes by a folder `site-packages` or `dist-packages` in their path. With any other folder
    (`pip install --target`) it reads on into CUTLASS, finds a ContextVar, and refuses every epilogue for lack of a
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
    """Checks that fused GEMMs can run.

    Raises:
        ImportError: quack-kernels is not installed.
        ValueError: there are no fused GEMMs for this GPU or dtype.
    """
    _quack()
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        raise ValueError(f"fused GEMMs have tiles for Hopper GPUs, not for {torch.cuda.get_device_name(device)}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"fused GEMMs are for half precision, not for {dtype}")


def fused_gemm(tiles: Tiles, x_PI: torch.Tensor, weights: GemmWeights) -> torch.Tensor:
    """activation(x W + b), [P, O], or [P, O / 2] if it is gated; see `Product`. Call `check_fused_gemm` first."""
    _, out_PO = _quack().gemm_act(
        x_PI,
        weights.weight_IO,
        bias=weights.epilogue_bias_O,
        activation=_NAMES[weights.activation],
        store_preact=False,
        tuned=False,
        config=_config(tiles),
        # The weight's halves are read interleaved; its memory layout does not change.
        concat_layout=("B",) if weights.activation == "gated_silu" else None,
    )
    assert isinstance(out_PO, torch.Tensor)
    return out_PO


def fused_gemm_add(to_PO: torch.Tensor, x_PI: torch.Tensor, weight_IO: torch.Tensor) -> None:
    """Adds x W to `to_PO`. Call `check_fused_gemm` first."""
    _quack().gemm_add_inplace(x_PI, weight_IO, to_PO, tuned=False)
