"""`python -m vitrine_vlm.simulation.what_must_hold`: makes the figures and pictures of docs/scale.md again.

It needs a clone with its chart and docs, and the extra `dev`; it takes five minutes of one core.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from vitrine_vlm.simulation.report import Report
from vitrine_vlm.simulation.what_must_hold import autoscaling, page, plot
from vitrine_vlm.simulation.what_must_hold.case import Case, Result, failures, run_case
from vitrine_vlm.simulation.what_must_hold.cases import FULL, SHORT, Size, cases
from vitrine_vlm.simulation.what_must_hold.chart import Kind

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m vitrine_vlm.simulation.what_must_hold", description=__doc__)
    parser.add_argument("--short", action="store_true", help="smaller runs, and no page")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    ramp = autoscaling.SHORT if options.short else autoscaling.FULL
    scaled = {
        kind: (autoscaling.run_scaled(kind, ramp, by_queue_alone=True), autoscaling.run_scaled(kind, ramp))
        for kind in get_args(Kind)
    }
    if not options.short:
        plot.draw_autoscaling(scaled, _DOCS / "pictures" / "scale_autoscaling.png")
        page.write(_DOCS / "scale.md", {"autoscaling": page.autoscaling_table(scaled)})
    results = _run(SHORT if options.short else FULL)
    if not options.short:
        plot.draw_cases(results, _DOCS / "pictures" / "scale_cases.png")
        parts = {"cases": page.cases_table(results), "goals": page.goals_list(results)}
        page.write(_DOCS / "scale.md", parts)
    found = [each for case, result in results for each in failures(case, result)]
    found += [each for _, now in scaled.values() for each in autoscaling.failures(now)]
    print(page.cases_table(results), page.autoscaling_table(scaled), *found, sep="\n")
    return 1 if found else 0


def _run(size: Size) -> list[tuple[Case, Result]]:
    results: list[tuple[Case, Result]] = []
    undisturbed: Report | None = None
    for case in cases(size):
        result = run_case(case, size.seed, undisturbed)
        undisturbed = undisturbed or result.figures  # the first case's: nothing happens
        results.append((case, result))
    return results


if __name__ == "__main__":
    sys.exit(main())
