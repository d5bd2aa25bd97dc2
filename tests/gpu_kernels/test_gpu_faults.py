"""A GPU is lost for a process after a fault, and not before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitrine_vlm.gpu_kernels.gpu_faults import is_lost

FAULT = """
import torch
from vitrine_vlm.gpu_kernels.gpu_faults import is_lost
gpu = torch.device("cuda")
assert not is_lost(gpu)
torch._assert_async(torch.zeros(1, device=gpu))
print("lost" if is_lost(gpu) else "usable", flush=True)
import os
os._exit(0)
"""


def test_the_cpu_is_never_lost() -> None:
    assert not is_lost(torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_is_lost_after_a_fault() -> None:
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lost"
