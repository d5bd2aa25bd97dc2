"""What docs/scale.md says must hold, on smaller fleets."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from vitrine_vlm.simulation.fleet import Fault
from vitrine_vlm.simulation.report import Report
from vitrine_vlm.simulation.what_must_hold.case import Case, failures, run_case
from vitrine_vlm.simulation.what_must_hold.cases import SHORT, cases

CASES = {case.key: case for case in cases(SHORT)}


@cache
def undisturbed() -> Report:
    return run_case(CASES["steady"], SHORT.seed).figures


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.key)
def test_what_must_hold_does(case: Case) -> None:
    assert failures(case, run_case(case, SHORT.seed, undisturbed())) == []


def test_items_leave_a_slow_encoder_and_the_others_hardly_ever() -> None:
    slow, steady = (run_case(CASES[key], SHORT.seed).figures for key in ("slow", "steady"))
    assert slow.num_moved > 10 * steady.num_moved


def test_goals_can_fail() -> None:
    """All encoders are lost in one moment."""
    lost = Fault("kill", 0.5, tuple(range(SHORT.num_encoders)))
    case = CASES["zone_loss"]
    case = replace(case, scenario=replace(case.scenario, faults=(lost,)), requests=case.requests[:200])
    found = failures(case, run_case(case, SHORT.seed, undisturbed()))
    assert any("no request is refused" in each for each in found)
    assert any("98 % of requests have a first token" in each for each in found)
