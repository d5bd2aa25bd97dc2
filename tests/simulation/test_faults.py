"""Faults of a simulated fleet do what they say, end when they say, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitrine_vlm.llm_worker.engine.step_costs import StepSize
from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.costs import MEASURED, Hardware
from vitrine_vlm.simulation.fleet import Fault
from vitrine_vlm.simulation.report import report
from vitrine_vlm.simulation.scenario import Scenario, Traffic
from vitrine_vlm.simulation.simulation import Run, simulate
from vitrine_vlm.simulation.workload import Picture

FLEET = Scenario(4, 4, Traffic(rate=40, seconds=4, num_generated=1))


def run_with(*faults: Fault, seed: int = 0, **changes: object) -> Run:
    run = simulate(replace(FLEET, faults=faults, **changes), seed)  # type: ignore[arg-type]
    assert violations(run) == []
    return run


def items_of(run: Run) -> list[int]:
    stats = [encoder.cache.stats() for encoder in run.fleet.all_encoders]
    return [each.hits + each.joined + each.misses for each in stats]


def test_a_partition_keeps_some_workers_from_an_encoder_and_heals() -> None:
    """What the cut workers had sent waits for the keepalive or for the end of the partition, whichever is first."""
    run = run_with(Fault("partition", 1.0, (0,), 5.0, workers=(0, 1)))
    slow = [outcome for outcome in run.outcomes if (outcome.ended_at or 0.0) - outcome.request.at > 1.0]
    assert slow and report(run).refused == {}
    assert all(run.outcomes.index(outcome) % 4 in (0, 1) for outcome in slow), "the other workers notice nothing"
    long = run_with(Fault("partition", 0.5, (0,), 60.0, workers=(0, 1)))
    assert report(long).refused == {} and report(long).num_retries > 0
    assert max(outcome.ended_at or 0.0 for outcome in long.outcomes) < 25, "the keepalive has noticed"


def test_a_broken_version_fails_its_items_until_it_is_rolled_back() -> None:
    run = run_with(Fault("bad_deploy", 0.5, (0, 1), 1.5, every_s=0.2))
    failed = [outcome.request.at for outcome in run.outcomes if outcome.error is not None]
    assert report(run).refused.keys() == {"internal_error"}
    assert failed and min(failed) > 0.4 and max(failed) < 2.3
    assert len(run.fleet.ended) == 4, "each was replaced twice"


def test_another_checkpoint_is_not_used_and_costs_no_request() -> None:
    run = run_with(Fault("wrong_checkpoint", 0.5, (0, 1), 20.0))
    assert report(run).refused == {}
    others = [each for each in run.fleet.all_encoders if each.description.identity.revision == "another"]
    assert len(others) == 2 and not any(each.contents for each in others)


def test_a_bad_link_delays_what_passes_it() -> None:
    well = report(run_with()).encode_s
    slow = report(run_with(Fault("link", 0.0, (0, 1, 2, 3), 30.0, factor=100.0))).encode_s
    lossy = report(run_with(Fault("link", 0.0, (0, 1, 2, 3), 30.0, factor=1.0, loss=0.02))).encode_s
    assert slow[0] - well[0] == pytest.approx(0.02, rel=0.2), "three messages of 10 ms, the layout beside the tower"
    assert lossy[0] < 0.02 and lossy[2] > 0.2 > well[2]


def test_fp8_and_other_gpus_change_what_steps_and_the_tower_take() -> None:
    bf16, fp8 = MEASURED.step_costs(), Hardware(decoder="fp8").step_costs()
    assert bf16.seconds(StepSize(1)) / fp8.seconds(StepSize(1)) == pytest.approx(1.29)
    assert bf16.decode_s[128] / fp8.decode_s[128] == pytest.approx(1.10)
    assert bf16.mixed_s[2048] / fp8.mixed_s[2048] == pytest.approx(1.61)
    assert 1.10 < bf16.decode_s[64] / fp8.decode_s[64] < 1.15, "between what was measured"
    grid, a100 = [Picture("", 560, 560).grid_thw], Hardware("a100-80gb")
    assert a100.tower_cost().batch_seconds(grid) / MEASURED.tower_cost().batch_seconds(grid) == pytest.approx(989 / 312)
    assert a100.step_costs().seconds(StepSize(1)) / bf16.seconds(StepSize(1)) == pytest.approx(4.8 / 2.04)
    h100 = Hardware("h100").step_costs()
    assert h100.decode_s[1] > bf16.decode_s[1]
    assert h100.mixed_s[8192] == pytest.approx(bf16.mixed_s[8192], rel=0.02), "the same operations a second"
