"""Muon on CPUs that have no bfloat16 instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its Newton-Schulz products in float32, for which torch has no option.

    Torch casts each gradient to bfloat16 first. A CPU without bfloat16 instructions takes up to 90 times as long for
    bfloat16 products as for float32 ones.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with _CastToBfloat16Copies():
            return super().step(closure)  # type: ignore[no-untyped-call]


class _CastToBfloat16Copies(TorchFunctionMode):
    """Makes `tensor.bfloat16()` return a copy in the tensor's dtype; a copy, because Muon changes it in place."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))
