"""Plots of a comparison, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.compare.comparison import Comparison
from benchmarks.compare.workloads import SWEEP
from benchmarks.pictures import show_size

_DPI = 110
_SHOWN = ("requests_per_s", "ttft_p50_ms", "itl_p99_ms")
_MAX_GROUPS = 3
_RATIO_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # also distinct for color-blind readers

_Point = dict[str, Any]


def save_plots(comparison: Comparison, folder: Path) -> list[tuple[str, str]]:
    """Writes the plots that the comparison has data for; returns their paths below the folder, and captions."""
    canvases = []
    if comparison.others:
        caption = f"How many times better {comparison.ours} is, load by load: right of 1 it is ahead."
        canvases.append(("ratios", _ratio_canvas(comparison), caption))
    for axis, what, label in _AXES:
        if groups := _groups(comparison, axis):
            canvas = _axis_canvas(comparison, axis, what, label, groups)
            canvases.append((axis, canvas, f"The sweep's loads by {what}."))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    saved = []
    for name, canvas, caption in canvases:
        path = f"pictures/comparison_{name}.png"
        canvas.savefig(folder / path, dpi=_DPI)
        saved.append((path, caption))
    return saved


def _ratio_canvas(comparison: Comparison) -> Canvas:
    loads = comparison.load_names
    figures = comparison.figures(_SHOWN)
    canvas = Canvas(figsize=(4 + 3.2 * len(figures), 1.6 + 0.26 * len(loads)), layout="constrained")
    row = canvas.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for plot, figure in zip(row, figures, strict=True):
        for other in comparison.others:
            ratios = [comparison.ratio(figure, load, comparison.ours, other) for load in loads]
            places = [place for place, each in enumerate(ratios) if _is_drawn(each)]
            plot.scatter(
                [ratios[place] for place in places],
                places,
                s=26,
                label=f"{comparison.ours} / {other}",
                color=_color(comparison, other),
            )
        plot.axvline(1.0, color="#555555", linewidth=1)
        plot.set_xscale("log")
        plot.xaxis.set_major_locator(FixedLocator(_RATIO_TICKS))
        plot.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        plot.xaxis.set_minor_locator(NullLocator())
        plot.tick_params(axis="x", labelsize=7)
        plot.set_title(f"{figure.plain_title}: times better", fontsize=9)
        plot.grid(axis="both", color="#dddddd", linewidth=0.6)
        plot.set_axisbelow(True)
    row[0].set_yticks(range(len(loads)), labels=loads, fontsize=7)
    row[0].set_ylim(len(loads) - 0.5, -0.5)  # the first load on top
    canvas.legend(*row[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8)
    return canvas


def _axis_canvas(
    comparison: Comparison, axis: str, what: str, label: Callable[[Any], str], groups: Sequence[Sequence[_Point]]
) -> Canvas:
    figures = comparison.figures(_SHOWN)
    canvas = Canvas(figsize=(4.2 * len(groups), 2.5 * len(figures)), layout="constrained")
    plots = canvas.subplots(len(figures), len(groups), squeeze=False)
    for column, group in enumerate(groups):
        for row, figure in enumerate(figures):
            plot = plots[row][column]
            for server in comparison.servers:
                values = [comparison.value(server, point["name"], figure) for point in group]
                places = [place for place, value in enumerate(values) if value is not None]
                drawn = [value for value in values if value is not None]
                plot.plot(places, drawn, marker="o", markersize=4, label=server, color=_color(comparison, server))
            plot.set_xticks(range(len(group)), labels=[label(point[axis]) for point in group], fontsize=7)
            plot.set_ylim(bottom=0, top=plot.get_ylim()[1])
            plot.set_ylabel(figure.title, fontsize=8)
            plot.tick_params(axis="y", labelsize=7)
            plot.grid(color="#dddddd", linewidth=0.6)
        plots[0][column].set_title(_group_title(group[0], axis), fontsize=8)
        plots[-1][column].set_xlabel(what, fontsize=8)
    plots[0][0].legend(fontsize=7)
    return canvas


def _groups(comparison: Comparison, axis: str) -> list[list[_Point]]:
    """Returns the sweep's loads that differ in nothing but `axis`: the groups with the most, each in its order."""
    groups: dict[str, list[_Point]] = {}
    for point in comparison.workloads():
        if point["name"].startswith(SWEEP):
            rest = {name: value for name, value in point.items() if name not in (axis, "name", "num_requests")}
            groups.setdefault(json.dumps(rest), []).append(point)
    several = [sorted(each, key=lambda point: point[axis]) for each in groups.values() if len(each) > 1]
    return sorted(several, key=len, reverse=True)[:_MAX_GROUPS]


def _group_title(point: _Point, axis: str) -> str:
    parts = {
        "num_pictures": f"{point['num_pictures']} a request",
        "size": show_size(point["size"]),
        "in_flight": f"{point['in_flight']} in flight",
        "max_tokens": f"{point['max_tokens']} tokens",
        "repeated": f"{point['repeated']:.0%} repeated" if point["repeated"] else "",
    }
    return ", ".join(text for name, text in parts.items() if text and name != axis)


_AXES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("in_flight", "requests in flight", str),
    ("size", "size of pictures", show_size),
    ("max_tokens", "tokens of an answer", str),
    ("num_pictures", "pictures a request", str),
    ("repeated", "share of repeated pictures", lambda share: f"{share:.0%}"),
)


def _is_drawn(ratio: float | None) -> bool:
    return ratio is not None and 0 < ratio < float("inf")


def _color(comparison: Comparison, server: str) -> str:
    return _COLORS[comparison.servers.index(server) % len(_COLORS)]
