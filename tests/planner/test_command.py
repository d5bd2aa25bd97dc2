"""`vitrine-plan` from its options to its table, its JSON, its plot and the chart's values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helm.rendering import of_kind, render
from vitrine_vlm.planner.__main__ import main
from vitrine_vlm.planner.costs import Costs, costs_of, read_costs
from vitrine_vlm.planner.fleet import run_split
from vitrine_vlm.planner.helm_values import helm_values
from vitrine_vlm.planner.measure import measure_decoder, measure_tower
from vitrine_vlm.planner.output import as_table
from vitrine_vlm.planner.plan import Goals, Plan, Prices, make_plan
from vitrine_vlm.planner.workload import Workload
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.simulation.worker import WorkerLimits
from vitrine_vlm.simulation.workload import Picture, SimulatedRequest

COSTS = costs_of("h200", "qwen3-vl-8b")


@pytest.fixture(scope="module")
def plan() -> Plan:
    requests = Workload(40, 1, ((560, 560),), 64, 4).requests(3.0, seed=0)
    return make_plan(requests, 40, COSTS, Goals(percentile=90), transport="grpc", prices=Prices(2.0, 3.0))


def test_the_goals_hold_with_the_gpus_that_are_planned(plan: Plan) -> None:
    assert plan.misses == () and plan.expected.failed == 0
    assert plan.expected.ttft_s[90] <= plan.goals.ttft_s
    assert max(plan.encoder_utilization, plan.worker_utilization) <= 0.8
    assert plan.nbytes_a_second == pytest.approx(40 * 324 * 4 * 4096 * 2)
    assert plan.cost_an_hour == 2.0 * plan.num_encoders + 3.0 * plan.num_workers
    assert plan.monolith.num_requests >= plan.expected.num_requests // plan.num_gpus


def test_the_table_names_what_is_missed(plan: Plan) -> None:
    missed = replace(plan, misses=("TTFT p90 is 900 ms, the goal is 500 ms",), simulated_part=0.25)
    table = as_table(missed, {"model": "m"})
    assert "MISSED: TTFT p90" in table and "25.0% of the fleet" in table and "model: m" in table


def test_a_goal_that_no_number_of_gpus_reaches_is_not_bought() -> None:
    requests = Workload(10, 1, ((560, 560),), 64, 1).requests(1.0, seed=0)
    plan = make_plan(requests, 10, COSTS, Goals(ttft_s=0.001))
    assert plan.num_gpus == 2 and "TTFT" in plan.misses[0]


def test_no_plan_comes_from_a_run_whose_checks_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the load bound twenty equal pictures go to one of three encoders."""
    requests = [SimulatedRequest(0.0, 16, 1, (Picture("a", 280, 280),))] * 20
    run_split(requests, COSTS, 3, 1, "cuda_ipc", WorkerLimits())
    monkeypatch.setattr("vitrine_vlm.embedding_transport.fleet.connected_peers.load_bound", lambda total, _: total + 1)
    with pytest.raises(RuntimeError, match="at their load bound"):
        run_split(requests, COSTS, 3, 1, "cuda_ipc", WorkerLimits())


@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc"])
def test_the_chart_renders_the_planned_pods(plan: Plan, transport: str) -> None:
    plan = replace(plan, transport=transport, num_encoders=2, num_workers=3)
    pods = of_kind(render(helm_values(plan, "Qwen/Qwen3-VL-8B-Instruct")), "Deployment")
    replicas = {
        half: sum(pod["spec"]["replicas"] for name, pod in pods.items() if half in name) for half in ("encoder", "llm")
    }
    assert replicas == {"encoder": 2, "llm": 3}


def test_one_line_gives_all_figures_as_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"at": %g, "num_text": 20, "num_generated": 2, "pictures": [{"key": "%d", "height": 280, "width": 280}]}'
    trace.write_text("\n".join(line % (0.1 * number, number) for number in range(20)))
    picture = tmp_path / "plan.png"
    assert main(["--trace", str(trace), "--json", "--plot", str(picture)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests_per_s"] == pytest.approx(10)
    assert figures["num_gpus"] == 2 and figures["expected"]["num_requests"] == 20
    assert figures["helm"]["model"] == "Qwen/Qwen3-VL-8B-Instruct"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--requests-per-s", "1", "--costs", "{}"], "no costs"), (["--trace", "missing.jsonl"], "missing.jsonl")],
)
def test_what_cannot_be_read_is_named(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "costs.json"
    empty.write_text("{}")
    assert main([str(empty) if each == "{}" else each for each in given]) == 2
    assert said in capsys.readouterr().err


def test_costs_of_this_machine_are_measured_and_read_again(tmp_path: Path) -> None:
    """As `vitrine-plan calibrate` does, which runs each half in a process of its own."""
    flags = ["--device", "cpu"]
    found = {**measure_tower(str(MODEL_FOLDER), flags), "decoder": measure_decoder(str(MODEL_FOLDER), flags)}
    costs = Costs.model_validate({**found, "source": "a test"})
    assert costs.tower.per_patch_s > 0 and min(costs.decoder.decode_s.values()) > 0
    file = tmp_path / "costs.json"
    file.write_text(costs.model_dump_json())
    assert read_costs(file) == costs
