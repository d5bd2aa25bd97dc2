"""A GPU that only nvidia-smi shows."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks.compare.gpu import find_gpu
from benchmarks.compare.machine import machine_facts, shown_environment

# Prints what nvidia-smi does, and 200 W ten times a second where it is asked again and again.
SMI = """#!/bin/sh
case "$*" in
  *"-i 0 "*power.draw*-lms*) while :; do echo 200.00; sleep 0.1; done ;;
  *"-i 0 "*memory.used*) echo 1024 ;;
  *"-i 0 "*name*) echo "NVIDIA H200, 580.1, 143771, 700.00" ;;
  *) echo "No devices were found"; exit 6 ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(SMI)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if nvidia-ml-py were not installed


@pytest.mark.usefixtures("smi")
def test_energy_is_the_power_added_up() -> None:
    gpu = find_gpu(0)
    assert gpu is not None
    try:
        assert gpu.memory_used_bytes() == 1024**3
        assert machine_facts(gpu)["GPU"] == "NVIDIA H200" and machine_facts(gpu)["GPU memory"] == "140 GiB"
        while (first := gpu.energy_j()) is None:
            time.sleep(0.01)
        start = time.monotonic()
        time.sleep(0.8)
        energy_j = gpu.energy_j()
        assert energy_j is not None
        assert energy_j - first == pytest.approx(200 * (time.monotonic() - start), abs=60)  # a few samples more or less
    finally:
        gpu.close()


class Nvml(types.ModuleType):
    """nvidia-ml-py with a driver that has no counter of energy."""

    NVMLError = RuntimeError
    nvmlSystemGetDriverVersion = nvmlDeviceGetName = staticmethod(lambda *_: "some")
    nvmlDeviceGetHandleByIndex = nvmlSystemGetCudaDriverVersion = staticmethod(lambda *_: 13000)
    nvmlDeviceGetEnforcedPowerLimit = staticmethod(lambda _: 700_000)
    nvmlDeviceGetMemoryInfo = staticmethod(lambda _: types.SimpleNamespace(total=1024**3, used=0))
    nvmlInit = nvmlShutdown = staticmethod(lambda: None)

    @staticmethod
    def nvmlDeviceGetTotalEnergyConsumption(_: object) -> int:
        raise RuntimeError("not supported")


@pytest.mark.usefixtures("smi")
def test_where_nvml_has_no_energy_nvidia_smi_has_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    gpu = find_gpu(0)
    assert gpu is not None
    try:
        assert gpu.about["GPU"] == "NVIDIA H200"
    finally:
        gpu.close()
    monkeypatch.setenv("PATH", "")
    alone = find_gpu(0)
    assert alone is not None and alone.about["GPU"] == "some" and alone.energy_j() is None


@pytest.mark.usefixtures("smi")
def test_there_may_be_none() -> None:
    assert find_gpu(1) is None
    assert machine_facts(None)["GPU"] == "none"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    assert shown_environment()["VLLM_USE_DEEP_GEMM"] == "0" and "VLLM_API_KEY" not in shown_environment()
