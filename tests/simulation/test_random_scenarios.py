"""What must hold holds after any of many small scenarios, with anything that users and faults do in them.

A failure prints its seed; `python -m vitrine_vlm.simulation --scenario random --seed N` replays it. Others are run with
VITRINE_SIMULATION_SEED (the first seed) and VITRINE_SIMULATION_RUNS.
"""

from __future__ import annotations

from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.scenario import random_scenario
from vitrine_vlm.simulation.simulation import simulate


def test_nothing_is_lost_answered_twice_left_behind_or_starved(scenario_seeds: range) -> None:
    for seed in scenario_seeds:
        scenario = random_scenario(seed)
        try:
            found = violations(simulate(scenario, seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {scenario}") from error
        assert not found, f"seed {seed}, {scenario}: {found[:5]}"
