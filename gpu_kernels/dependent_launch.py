"""Programmatic dependent launch: from Hopper on, a kernel may begin while the one in front of it still runs.

Such a kernel first of all calls `gdc_launch_dependents`, so that the next one can begin, and `gdc_wait` before it reads
what the one in front writes, and before it writes anything itself. This hides the start of kernels that run for
microseconds.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on the device are launched so, for their constant `PDL` and their option `launch_pdl`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
