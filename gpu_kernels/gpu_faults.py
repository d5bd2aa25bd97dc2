"""Faults after which a GPU does nothing more for a process, as an illegal address or a device that fell off its bus."""

from __future__ import annotations

import torch


def is_lost(device: torch.device) -> bool:
    """Whether every later call of this process will fail there, whatever it is; waits for what runs there."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # CUDA repeats the error for ever
        return True
    return False
