"""Which dtype a service computes in, and what it asks of the CPU for that."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from vitrine_vlm.model_loading import loading
from vitrine_vlm.model_loading.loading import DtypeChoice, choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "device", "stored", "chosen"),
    [
        ("auto", CPU, torch.bfloat16, "float32"),
        ("auto", CPU, torch.float32, "float32"),
        ("auto", GPU, torch.bfloat16, "bfloat16"),
        ("auto", GPU, torch.float32, "float32"),
        ("bfloat16", CPU, torch.float32, "bfloat16"),
        ("float32", GPU, torch.bfloat16, "float32"),
    ],
)
def test_a_cpu_computes_in_float32_unless_told_otherwise(
    choice: DtypeChoice, device: torch.device, stored: torch.dtype, chosen: str
) -> None:
    assert choose_dtype(choice, device, stored) == chosen


@pytest.mark.parametrize(
    ("choice", "has_bfloat16", "logged"),
    [
        ("auto", True, "stored as torch.bfloat16 and computed with in float32"),
        ("bfloat16", False, "no instructions for it"),
        ("bfloat16", True, ""),
    ],
)
def test_the_log_says_why(
    choice: DtypeChoice,
    has_bfloat16: bool,
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: has_bfloat16)
    with caplog.at_level(logging.INFO):
        choose_dtype(choice, CPU, torch.bfloat16)
    assert logged in caplog.text
    assert bool(caplog.text) == bool(logged)


def test_a_cpu_limited_to_avx2_has_no_bfloat16() -> None:
    """The environment is read once in a process; `.ci/run` runs some tests under it."""
    code = "from vitrine_vlm.model_loading.loading import cpu_has_bfloat16; print(cpu_has_bfloat16())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
