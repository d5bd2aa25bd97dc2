"""One GPU as its driver shows it: name, memory in use, energy. By nvidia-ml-py, or else by nvidia-smi."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from typing import Protocol

_SAMPLE_MS = 100
_MIB = 1024 * 1024


class Gpu(Protocol):
    """A GPU. `about`: its name, driver and the like, to be shown."""

    about: dict[str, str]

    def memory_used_bytes(self) -> int:
        """Returns the memory in use by all processes."""

    def energy_j(self) -> float | None:
        """Returns the energy so far since some time in the past, joules; None if the driver does not say."""

    def close(self) -> None:
        """Releases what was opened."""


def find_gpu(index: int) -> Gpu | None:
    """Returns the GPU of this number, as the driver counts; None if there is no NVIDIA GPU."""
    by_nvml: _NvmlGpu | None = None
    with contextlib.suppress(ImportError):
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            by_nvml = _NvmlGpu(index)
    if by_nvml is not None and by_nvml.energy_j() is not None:
        return by_nvml
    # A driver without a counter of energy may say the power.
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.CalledProcessError, ValueError):
            by_smi = _SmiGpu(index)
            if by_nvml is not None:
                by_nvml.close()
            return by_smi
    return by_nvml


class _NvmlGpu:
    def __init__(self, index: int) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        self.about = {
            "GPU": _text(pynvml.nvmlDeviceGetName(self._handle)),
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "CUDA of the driver": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "GPU memory": f"{pynvml.nvmlDeviceGetMemoryInfo(self._handle).total / 1024**3:.0f} GiB",
        }
        with contextlib.suppress(pynvml.NVMLError):
            self.about["power limit"] = f"{pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000:.0f} W"

    def memory_used_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def energy_j(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        self._nvml.nvmlShutdown()


class _SmiGpu:
    """Adds up the power that one nvidia-smi process prints several times a second."""

    def __init__(self, index: int) -> None:
        self._index = index
        name, driver, total, limit = self._query("name", "driver_version", "memory.total", "power.limit")
        self.about = {"GPU": name, "driver": driver, "GPU memory": f"{float(total) / 1024:.0f} GiB"}
        self.about["power limit"] = f"{limit} W"
        self._energy_j: float | None = None
        command = ["nvidia-smi", "-i", str(index), "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        command += ["-lms", str(_SAMPLE_MS)]
        self._sampling = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._add_up, name="power samples", daemon=True)
        self._thread.start()

    def memory_used_bytes(self) -> int:
        return int(self._query("memory.used")[0]) * _MIB

    def energy_j(self) -> float | None:
        return self._energy_j

    def close(self) -> None:
        self._sampling.terminate()
        self._sampling.wait()
        self._thread.join()

    def _query(self, *fields: str) -> list[str]:
        command = ["nvidia-smi", "-i", str(self._index), f"--query-gpu={','.join(fields)}"]
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True)
        return [field.strip() for field in done.stdout.strip().split(",")]

    def _add_up(self) -> None:
        assert self._sampling.stdout is not None
        last = time.monotonic()
        for line in self._sampling.stdout:
            now = time.monotonic()
            with contextlib.suppress(ValueError):  # "[N/A]"
                self._energy_j = (self._energy_j or 0.0) + float(line) * (now - last)
            last = now


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
