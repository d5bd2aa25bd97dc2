"""Faults after which a process can use a GPU no more, as an illegal address or a device that fell off its bus."""

from __future__ import annotations

import torch


def is_lost(device: torch.device) -> bool:
    """Whether every further call of this process on the device will fail; waits for the work that runs there."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # CUDA repeats the error in every call
        return True
    return False
