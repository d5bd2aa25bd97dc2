"""Programmatic dependent launch: from Hopper on, a kernel may begin while the one in front of it still runs.

Such a kernel calls `gdc_wait` before it reads what the one in front writes, and before it writes anything itself; and
`gdc_launch_dependents` first of all, so that the next can begin. Between steps of microseconds this hides the start.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on that device are launched so: the constant `PDL` of a kernel and its option `launch_pdl`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
