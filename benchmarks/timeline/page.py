"""The page of a timeline: tables, and a plot of its middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from benchmarks.timeline.gaps import Cause, busy_s, gaps_between, kinds_of, on_the_same_device, overlap_s
from benchmarks.timeline.span import Kind, Span

_COLORS: Mapping[Kind | Cause, str] = {
    "batch": "#0072b2",
    "decode": "#009e73",
    "mixed": "#e69f00",
    "prompts": "#cc79a7",
    "launched late": "#d55e00",
    "launched late, or nothing to compute": "#f5c9ad",
    "launched, not begun": "#bbbbbb",
}


def tables(spans: Mapping[str, Sequence[Span]], window_s: float) -> str:
    """Markdown: what each process did in these seconds, and what it waited for.

    Args:
        spans: by process, in order; processes without any are left out.
    """
    busy = ["| process | busy, of the time | with another process on the device |", "|---|---|---|"]
    kinds = [
        "| process | what | number | tokens or patches | alone, ms | beside another process, number | ms "
        "| launching, ms | ended when launched, number |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    causes = ["| process | gaps | of the time | of it another process computes |", "|---|---|---|---|"]
    for name, own in spans.items():
        if not own:
            continue
        others = on_the_same_device(name, spans)
        busy.append(f"| {name} | {busy_s(own) / window_s:.3f} | {overlap_s(own, others) / window_s:.3f} |")
        for each in kinds_of(own, others):
            kinds.append(
                f"| {name} | {each.kind} | {each.count} | {each.num_tokens:.0f} | {each.alone_ms:.2f} | "
                f"{each.shared} | {each.shared_ms:.2f} | {each.launch_ms:.2f} | {each.host_bound} |"
            )
        gaps = gaps_between(own)
        for cause in get_args(Cause):
            of_cause = [gap for gap in gaps if gap.cause == cause]
            share, shared = busy_s(of_cause) / window_s, overlap_s(of_cause, others) / window_s
            causes.append(f"| {name} | {cause} | {share:.3f} | {shared:.3f} |")
    return "\n".join([*busy, "", *kinds, "", *causes])


def save_plot(file: Path, spans: Mapping[str, Sequence[Span]], begin_s: float, end_s: float) -> None:
    """Draws what is on the device within these seconds, and the gaps, a row for each process."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    canvas = Figure(figsize=(16, 1.5 + 0.9 * len(spans)), layout="constrained")
    plot = canvas.subplots()
    for row, own in enumerate(spans.values()):
        drawn: list[tuple[float, float, Kind | Cause]] = [(each.begin_s, each.end_s, each.kind) for each in own]
        drawn += [(gap.begin_s, gap.end_s, gap.cause) for gap in gaps_between(own)]
        for what, color in _COLORS.items():
            bars = [
                (1e3 * (start - begin_s), 1e3 * (stop - start))
                for start, stop, each in drawn
                if each == what and stop > begin_s and start < end_s
            ]
            height = 0.8 if what in get_args(Kind) else 0.3
            plot.broken_barh(bars, (row - height / 2, height), facecolors=color, edgecolors="white", linewidth=0.3)
    plot.set_xlim(0, 1e3 * (end_s - begin_s))
    plot.set_ylim(len(spans) - 0.5, -0.5)
    plot.set_yticks(range(len(spans)), labels=list(spans))
    plot.set_xlabel("ms")
    handles = [Patch(color=color, label=what) for what, color in _COLORS.items()]
    canvas.legend(handles=handles, loc="outside upper left", ncols=len(_COLORS), fontsize=8)
    canvas.savefig(file, dpi=110)
