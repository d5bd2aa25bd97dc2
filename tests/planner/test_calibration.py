"""The model of a GPU beside what was measured on one: the bounds, and the table that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitrine_vlm.planner.calibration import compare
from vitrine_vlm.planner.measured_loads import CROSSOVER, MEASURED

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
BY_NAME = {each.name: each for each in MEASURED}
# `python -m vitrine_vlm.planner.calibration` runs all; these take a few seconds together.
QUICK = (
    "encoder, 560x560, 1 in flight",
    "encoder, 1080p, 1",
    "encoder, gRPC, 560x560, 1",
    "split on two GPUs, 560x560, 32, 1 token",
    "both on one GPU in time slices, 560x560, 32, 1 token",
    "both on one GPU by MPS, 1080p, 8, 64 tokens",
    "both on one GPU by MPS, 1080p, one at a time",
    "vLLM, 1080p, one at a time",
    "vLLM in mode M, 1080p, one at a time",
)


@pytest.mark.parametrize("name", QUICK)
def test_requests_are_within_a_tenth_and_ttft_within_a_fifth(name: str) -> None:
    compared = compare(BY_NAME[name])
    assert compared.is_within, (compared.rate, compared.ttft)


def test_the_page_has_every_load_and_marks_those_that_are_off() -> None:
    """The worst case is in the table, not left out."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    rows = {row[0]: row for row in cells if row and row[0] in BY_NAME}
    assert rows.keys() == BY_NAME.keys()
    for name, (_, rates, rate, ttfts, ttft, mark) in rows.items():
        measured, ratios = BY_NAME[name], [(rate, 0.1), (ttft, 0.2)]
        assert float(rates.split(" / ")[0]) == measured.requests_per_s
        assert bool(ttfts) == (measured.ttft_s is not None)
        is_off = any(abs(float(each) - 1) > bound + 0.005 for each, bound in ratios if re.fullmatch(r"[\d.]+", each))
        assert not is_off or mark == "**off**", name
    fit = [each for each in MEASURED if each.system in ("encoder", "apart") and each not in CROSSOVER]
    assert all(rows[each.name][5] == "" for each in fit)
