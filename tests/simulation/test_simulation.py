"""The simulated fleet: equal seeds give equal runs, its parts take what was measured, and its checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vitrine_vlm.simulation.__main__ import main
from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.costs import MEASURED
from vitrine_vlm.simulation.fleet import Fault
from vitrine_vlm.simulation.report import digest, report
from vitrine_vlm.simulation.scenario import SCENARIOS, Scenario, Traffic, random_scenario
from vitrine_vlm.simulation.simulation import Run, simulate
from vitrine_vlm.simulation.workload import Picture, SimulatedRequest, read_trace

# A third of ten encoders.
FAULTS = (replace(SCENARIOS["zone_loss"].faults[0], at=1.0),)
SMALL = Scenario(4, 2, Traffic(rate=20, seconds=2, num_generated=2))


def of_traffic(**changes: object) -> Scenario:
    return replace(SMALL, traffic=replace(SMALL.traffic, **changes))  # type: ignore[arg-type]


def test_equal_seeds_give_equal_runs_in_any_process() -> None:
    """Another process hashes strings otherwise, so that an order of a set would show."""
    seed = 17
    first, second = (digest(simulate(random_scenario(seed), seed)) for _ in range(2))
    command = [sys.executable, "-m", "vitrine_vlm.simulation", "--scenario", "random", "--seed", str(seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert first == second == json.loads(done.stdout)["digest"]
    assert first != digest(simulate(random_scenario(seed), seed + 1))


def test_the_costs_are_those_that_were_measured() -> None:
    """The cost model has three coefficients for five figures of docs/performance.md."""
    cost = MEASURED.tower_cost()
    assert cost.batch_seconds([Picture("", 560, 560).grid_thw] * 32) == pytest.approx(84.29e-3, rel=0.1)
    assert cost.batch_seconds([Picture("", 720, 1280).grid_thw] * 8) == pytest.approx(74.89e-3, rel=0.1)
    assert cost.batch_seconds([Picture("", 1080, 1920).grid_thw] * 4) == pytest.approx(125.34e-3, rel=0.1)


def test_one_request_takes_its_stages() -> None:
    """Open 0.3 ms, patches 1 ms, the tower 3.2 ms, then a prompt of 340 tokens in one step."""
    request = SimulatedRequest(0.0, 16, 1, (Picture("a", 560, 560),))
    run = simulate(replace(SMALL, num_encoders=1), 0, [request])
    (outcome,) = run.outcomes
    assert outcome.embeddings_at is not None and outcome.first_token_at is not None
    assert outcome.embeddings_at == pytest.approx(5.1e-3, rel=0.15)
    assert outcome.first_token_at - outcome.embeddings_at == pytest.approx(9.5e-3, rel=0.2)
    assert violations(run) == []


def test_equal_pictures_are_computed_once_and_agents_send_theirs_to_the_same_encoders() -> None:
    run = simulate(of_traffic(pattern="agents", rate=12), 1)
    figures = report(run)
    assert figures.computed_part == figures.distinct_part < 0.5
    assert violations(run) == []


def test_a_viral_picture_is_bounded_by_the_load_of_the_others() -> None:
    run = simulate(of_traffic(viral=0.5, rate=200, seconds=1), 1)
    counts = [encoder.cache.stats() for encoder in run.fleet.all_encoders]
    numbers = [each.hits + each.joined + each.misses for each in counts]
    assert max(numbers) < 0.75 * sum(numbers) and violations(run) == []


def test_a_lost_zone_costs_no_request() -> None:
    run = simulate(
        replace(SCENARIOS["zone_loss"], traffic=Traffic(rate=200, seconds=1.5, num_generated=1), faults=FAULTS), 3
    )
    figures = report(run)
    assert figures.refused == {} and figures.num_retries > 0
    assert violations(run) == []


def test_checks_find_what_is_lost_answered_twice_or_left_behind() -> None:
    def found(run: Run) -> str:
        return " ".join(violations(run))

    run = simulate(SMALL, 0)
    assert not violations(run)
    run.outcomes[0].num_answers += 1
    assert "was answered 2 times" in found(run)
    run.outcomes[0].num_answers, run.outcomes[0].error = 1, "internal"
    assert "failed with internal" in found(run)
    run.outcomes.pop(0)
    assert "outcomes" in found(run)
    encoder = run.fleet.all_encoders[0]
    encoder.admission.num_patches += 4
    assert "4 patches" in found(run)
    encoder.longest_queue_s = 40.0
    assert "waited 40.0 s" in found(run)
    run.fleet.workers[0].peers[0].num_leases += 1
    assert "1 leases" in found(run)


def test_checks_find_refusals_and_order_and_work_for_which_there_is_no_reason() -> None:
    """In runs with faults as well, as far as these are no reason."""
    run = simulate(replace(SMALL, faults=(Fault("slow", 0.5, (0,), 1.0, factor=2.0),)), 0)
    assert not violations(run)
    slow, other = run.fleet.all_encoders[:2]
    slow.longest_queue_s = other.longest_queue_s = 40.0
    assert [each for each in violations(run) if "waited" in each] == [
        f"an item waited 40.0 s at {other.address}, and 32 s is the most"
    ]
    other.longest_queue_s = 0.0
    well = replace(run, scenario=SMALL)
    for error, of, is_found in (
        ("overloaded", well, False),
        ("encoder_unavailable", run, False),
        ("encoder_unavailable", well, True),
        ("internal_error", run, True),
    ):
        run.outcomes[0].error = error
        assert any("failed with" in each for each in violations(of)) == is_found
    run.outcomes[0].error, first_at = None, run.outcomes[0].first_token_at
    run.outcomes[0].first_token_at = 100.0
    assert "before" in " ".join(violations(run))
    run.outcomes[0].first_token_at = first_at
    assert not violations(run)
    other.contents.clear()
    assert "items were computed" in " ".join(violations(run))


def test_the_load_bound_is_checked_whatever_routing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrine_vlm.embedding_transport.fleet.connected_peers.load_bound", lambda total, _: total + 1)
    run = simulate(of_traffic(viral=0.9, rate=200, seconds=0.5), 1)
    assert all("at their load bound" in each for each in violations(run)) and violations(run)


def test_the_command_reads_a_trace_and_says_what_is_wrong_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = {"key": "a", "height": 560, "width": 560}
    lines = [{"at": at, "num_text": 20, "num_generated": 2, "pictures": [picture]} for at in (0.5, 0.25)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert main(["--trace", str(trace), "--encoders", "2", "--workers", "1"]) == 0
    assert "all checks passed" in capsys.readouterr().out
    assert [request.at for request in read_trace(trace)] == [0.25, 0.5]
    trace.write_text(json.dumps({**lines[0], "num_text": 0}))
    with pytest.raises(ValueError, match=r"line 1 .* must be 1 or more"):
        read_trace(trace)
    trace.write_text('{"at": 1}')
    with pytest.raises(ValueError, match=r"line 1 .* is no request"):
        read_trace(trace)
