"""The pictures of docs/scale.md."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vitrine_vlm.simulation.what_must_hold.autoscaling import Scaled
from vitrine_vlm.simulation.what_must_hold.case import Case, Result

_SLICE_S = 0.25
_TITLE_WIDTH = 60


def draw_cases(results: Sequence[tuple[Case, Result]], file: Path) -> None:
    """Writes TTFT over time of each case, PNG."""
    figure = Figure(figsize=(11, 10), layout="constrained")
    panels = figure.subplots((len(results) + 1) // 2, 2, sharey=True).flat
    for (case, result), panel in zip(results, panels, strict=False):
        answered = [each for each in result.run.outcomes if each.first_token_at is not None]
        begin = np.array([each.request.at for each in answered])
        ttft_s = np.array([(each.first_token_at or 0.0) - each.request.at for each in answered])
        slices = (begin // _SLICE_S).astype(int)
        at = np.unique(slices)
        for percentile in (50, 99):
            values = [np.percentile(ttft_s[slices == each], percentile) for each in at]
            panel.plot((at + 0.5) * _SLICE_S, values, label=f"TTFT p{percentile}")
        panel.axhline(result.run.scenario.worker_limits.target_ttft_s, color="gray", linewidth=0.8, linestyle="--")
        if case.since is not None:
            last = begin.max() if case.until is None else case.until
            panel.axvspan(case.since, last, color="tab:red", alpha=0.1, linewidth=0)
        panel.set_title(textwrap.fill(case.what, _TITLE_WIDTH), fontsize="medium")
        panel.set_yscale("log")
        panel.set_ylabel("s")
        panel.legend(loc="upper left", fontsize="small")
    figure.supxlabel("seconds")
    figure.savefig(file, dpi=90)


def draw_autoscaling(results: Mapping[str, tuple[Scaled, Scaled]], file: Path) -> None:
    """Writes the pods over time for each kind of autoscaler, by queue alone and by queue and load, PNG."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    for (kind, (before, now)), panel in zip(
        results.items(), figure.subplots(len(results), 1, sharex=True), strict=True
    ):
        minutes = np.array(now.at) / 60
        panel.plot(minutes, before.num_pods, color="tab:orange", linewidth=0.9, label="pods, by the queue alone")
        panel.plot(minutes, now.num_pods, color="tab:blue", label="pods, by queue and load")
        panel.plot(minutes, now.num_needed, color="black", linestyle="--", label="pods at 70 % load")
        panel.set_title(kind, fontsize="medium")
        panel.legend(loc="upper right", fontsize="small")
    figure.supxlabel("minutes")
    figure.savefig(file, dpi=90)
