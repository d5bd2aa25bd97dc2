"""What a comparison ran on, to be shown beside its figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from benchmarks.compare.gpu import Gpu

_SHOWN = ("CUDA_", "NCCL_", "OMP_", "SGLANG_", "SGL_", "TORCH", "VITRINE_", "VLLM_")
_SECRET = ("KEY", "PASSWORD", "SECRET", "TOKEN")


def machine_facts(gpu: Gpu | None) -> dict[str, str]:
    """Returns facts by their names, which stay the same as long as the machine does.

    The memory is none of them: that of a virtual machine may grow as it is used.
    """
    return {
        **(gpu.about if gpu else {"GPU": "none"}),
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}",
        "Python of the client": platform.python_version(),
    }


def shown_environment() -> dict[str, str]:
    """Returns the variables that change how servers run; none that may be a secret."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN) and not any(part in name for part in _SECRET)
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
