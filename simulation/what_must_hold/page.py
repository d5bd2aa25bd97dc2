"""The tables of docs/scale.md, which stand between marks in it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitrine_vlm.simulation.what_must_hold.autoscaling import Scaled
from vitrine_vlm.simulation.what_must_hold.case import Case, Result

_WIDTH = 120


def cases_table(results: Sequence[tuple[Case, Result]]) -> str:
    rows = [
        "| what happens | encoders, requests | goodput, requests/s | in time | TTFT p50 / p99, ms | load spread | "
        "cache hits, ideal | retries | moved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, result in results:
        figures = result.figures
        p50, _, p99 = (f"{1e3 * each:.0f}" for each in figures.ttft_s)
        hits, ideal = 100 * (1 - figures.computed_part), 100 * (1 - figures.distinct_part)
        rows.append(
            f"| {case.what} | {case.scenario.num_encoders}, {figures.num_requests} | {figures.goodput:.0f} | "
            f"{100 * result.in_time:.1f} % | {p50} / {p99} | {result.load_spread:.2f} | "
            f"{hits:.1f} %, {ideal:.1f} % | {figures.num_retries} | {figures.num_moved} |"
        )
    return "\n".join(rows)


def goals_list(results: Sequence[tuple[Case, Result]]) -> str:
    """What must hold, and where it does not."""
    lines = []
    for case, result in results:
        goals = "; ".join(f"{'' if goal.holds(result) else '**not held**: '}{goal.text}" for goal in case.goals)
        lines.append(textwrap.fill(f"- {case.what}: {goals}.", _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def autoscaling_table(results: Mapping[str, tuple[Scaled, Scaled]]) -> str:
    rows = [
        "| autoscaler | pods started again | items in time | refused | pod hours |",
        "|---|---|---|---|---|",
    ]
    for kind, both in results.items():
        for by, result in zip(("the queue alone", "queue and load"), both, strict=True):
            rows.append(
                f"| {kind}, by {by} | {result.num_turns} | {100 * result.in_time:.1f} % | "
                f"{100 * result.refused:.1f} % | {result.pod_hours:.0f} |"
            )
    return "\n".join(rows)


def write(page: Path, parts: Mapping[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end -->` for each name.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text()
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{page} has no place for {name}: it needs <!-- {name} --> and <!-- end --> below")
        text = f"{before}{mark}{part}\n{end}{after}"
    page.write_text(text)
