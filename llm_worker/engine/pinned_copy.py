"""Copies between host and device that wait for no work of the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(
    device: torch.device, values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Copies the values to the device without waiting for its running work."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(on_device: torch.Tensor) -> torch.Tensor:
    """Copies without waiting; the copy is complete once an event recorded after it has completed."""
    return on_device.to("cpu", non_blocking=True)
