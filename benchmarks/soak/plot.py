"""Draws a soak: requests and their times, memory, and when what was disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.soak.__main__ import Result

_SLICE_S = 10.0


def draw(result: Result, file: Path) -> None:
    """Writes the picture, PNG."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    times, failures, memory = figure.subplots(3, 1, sharex=True)
    outcomes = [each for each in result.outcomes if each.at >= result.begin]
    answered = [each for each in outcomes if each.error is None and not each.abandoned]
    slices = np.array([(each.at - result.begin) // _SLICE_S for each in answered], dtype=int)
    seconds = np.array([each.seconds for each in answered])
    at = np.unique(slices)
    for percentile in (50, 99):
        values = [np.percentile(seconds[slices == each], percentile) for each in at]
        times.plot(at * _SLICE_S / 60, values, label=f"p{percentile}")
    times.set_ylabel("request to end of answer, s")
    times.set_yscale("log")
    times.legend(loc="upper right")
    for each in result.disturbances:
        minute = (each.at - result.begin) / 60
        if minute >= 0:
            color = "tab:red" if each.what == "killed" else "tab:blue"
            times.axvspan(minute, minute + each.down_s / 60, color=color, alpha=0.15, linewidth=0)
    times.set_title("red: an encoder was killed and is not up again; blue: a worker restarts", fontsize="medium")
    counts = np.bincount(slices, minlength=int(at.max()) + 1)
    failures.plot(np.arange(len(counts)) * _SLICE_S / 60, counts / _SLICE_S, label="answered")
    failed = np.array([(each.at - result.begin) // _SLICE_S for each in outcomes if each.error is not None], dtype=int)
    failed_counts = np.bincount(failed, minlength=len(counts))
    failures.plot(np.arange(len(failed_counts)) * _SLICE_S / 60, failed_counts / _SLICE_S, label="failed")
    failures.set_ylabel("requests a second")
    failures.legend(loc="center right")
    for name in dict.fromkeys(each.service for each in result.samples):
        mine = [each for each in result.samples if each.service == name]
        memory.plot(
            [(each.at - result.begin) / 60 for each in mine], [each.rss_nbytes / 2**20 for each in mine], label=name
        )
    memory.set_ylabel("memory, MiB")
    memory.set_xlabel("minutes")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower right", ncols=3)
    figure.savefig(file, dpi=110)
