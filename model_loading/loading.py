"""The common part of loading in both services: choose device and dtype, log progress, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.model_loading.checkpoint import CheckpointError

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]

_log = logging.getLogger(__name__)
_PROGRESS_INTERVAL_S = 0.5


class LoadingStopped(Exception):
    """The service was stopped while it loaded."""


class ProgressLog:
    """Logs progress at most every half second, and the end; raises LoadingStopped once `must_stop` returns True."""

    def __init__(self, what: str, must_stop: Callable[[], bool], show: Callable[[float], None]) -> None:
        """
        Args:
            what: the beginning of each log line.
            show: called with the fraction that is done, 0 to 1, at every call.
        """
        self._what = what
        self._must_stop = must_stop
        self._show = show
        self._logged_at = float("-inf")

    def __call__(self, num_done: int, num_all: int) -> None:
        if self._must_stop():
            raise LoadingStopped
        self._show(num_done / num_all if num_all else 1.0)
        now = time.monotonic()
        if num_done == num_all or now - self._logged_at >= _PROGRESS_INTERVAL_S:
            self._logged_at = now
            _log.info("%s %d/%d", self._what, num_done, num_all)


def choose_device(choice: DeviceChoice) -> torch.device:
    """Returns the device; "auto" is a GPU if torch finds one.

    Raises:
        CheckpointError: the choice is "cuda", and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if choice == "cuda" and not has_gpu:
        raise CheckpointError("device is cuda, but torch finds no GPU: install the CUDA build of torch or use the CPU")
    return torch.device("cuda" if has_gpu and choice != "cpu" else "cpu")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products that torch uses (AVX-512 BF16, AMX).

    Without them, such a product takes up to 6 times (AVX-512) or 90 times (AVX2) as long as in float32. oneDNN
    respects ONEDNN_MAX_CPU_ISA, but also reports support for plain AVX-512, where it converts; torch.cpu reports the
    CPU's own instructions.
    """
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


def choose_dtype(choice: DtypeChoice, device: torch.device, stored: torch.dtype) -> str:
    """Returns the name of the dtype; "auto" is the stored one on a GPU, and float32 on the CPU.

    Raises:
        CheckpointError: the weights are stored in an unsupported dtype.
    """
    if choice != "auto":
        if choice == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
            _log.warning("dtype is bfloat16, but this CPU has no instructions for it: float32 is many times faster")
        return choice
    if device.type == "cpu":
        if stored != torch.float32:
            _log.info("the weights are stored as %s and computed with in float32, as on every CPU", stored)
        return "float32"
    for name, dtype in DTYPES.items():
        if dtype == stored:
            return name
    raise CheckpointError(f"the weights are stored as {stored}: choose --dtype float32 or bfloat16")
