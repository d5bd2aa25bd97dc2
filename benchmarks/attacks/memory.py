"""Memory of running processes, from Linux's /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def reset_peaks(pids: Iterable[int]) -> None:
    """Begins the peaks of these processes at what they use now."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_mib(pid: int) -> float:
    """The most memory that was resident since `reset_peaks`."""
    return _status_mib(pid, "VmHWM")


def resident_mib(pid: int) -> float:
    return _status_mib(pid, "VmRSS")


def _status_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
