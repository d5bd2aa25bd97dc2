"""What both services do alike while they load their half of a checkpoint: pick device and dtype, log, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

from vitrine_vlm.model_loading.checkpoint import CheckpointError
from vitrine_vlm.types import DTYPES

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]

_log = logging.getLogger(__name__)
_PROGRESS_INTERVAL_S = 0.5


class LoadingStopped(Exception):
    """The service was told to stop while it loaded."""


class ProgressLog:
    """Logs at most every half second, and the end; raises LoadingStopped once `must_stop` says so."""

    def __init__(self, what: str, must_stop: Callable[[], bool], show: Callable[[float], None]) -> None:
        """
        Args:
            show: called with the part that is done, 0 to 1, every time.
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
    """auto: a GPU where torch sees one.

    Raises:
        CheckpointError: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if choice == "cuda" and not has_gpu:
        raise CheckpointError("device is cuda, but torch sees no GPU: install the CUDA build of torch or use the CPU")
    return torch.device("cuda" if has_gpu and choice != "cpu" else "cpu")


def cpu_has_bfloat16() -> bool:
    """Whether torch computes bfloat16 products on this CPU by instructions of its own (AVX-512 BF16, AMX).

    Without them, such a product takes up to 6 times (AVX-512) or 90 times (AVX2) as long as in float32. oneDNN knows
    what ONEDNN_MAX_CPU_ISA permits, but answers yes to AVX-512 alone, too, for which it converts; torch.cpu knows what
    the CPU has.
    """
    return bool(
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


def choose_dtype(choice: DtypeChoice, device: torch.device, stored: torch.dtype) -> str:
    """Name of the dtype; auto: the stored one on a GPU, float32 on the CPU, where half precision is slow.

    Raises:
        CheckpointError: the weights are stored in a dtype that is not served.
    """
    if choice != "auto":
        if choice == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
            _log.warning("dtype is bfloat16, but this CPU has no instructions for it: float32 is many times as fast")
        return choice
    if device.type == "cpu":
        if stored != torch.float32:
            _log.info("the weights are stored as %s and computed with in float32, as on every CPU", stored)
        return "float32"
    for name, dtype in DTYPES.items():
        if dtype == stored:
            return name
    raise CheckpointError(f"the weights are stored as {stored}: choose --dtype float32 or bfloat16")
