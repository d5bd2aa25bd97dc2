"""The formulas of a plan, by cases that are worked out by hand."""

from __future__ import annotations

import pytest

from vitrine_vlm.planner.costs import Costs, DecoderCosts, TowerCosts, costs_of
from vitrine_vlm.planner.demand import demand_of, num_gpus
from vitrine_vlm.planner.plan import network_for
from vitrine_vlm.planner.workload import Workload, at_rate, rate_of
from vitrine_vlm.simulation.workload import Picture, SimulatedRequest

# A millisecond a patch, a millisecond a prompt token, 16 ms a step of 16 sequences; attention takes nothing.
ROUND = Costs(
    gpu="round",
    model="round",
    source="by hand",
    row_nbytes=100,
    tower=TowerCosts(fixed_s=1.0, per_patch_s=1e-3, per_pair_s=0.0),
    decoder=DecoderCosts(decode_s={1: 0.016, 16: 0.016}, mixed_s={2048: 2.048}, per_key_s=0.0, per_pair_s=0.0),
    picture_s=0.0,
)
SMALL = Picture("a", 64, 64)  # 16 patches, 4 tokens


def test_a_request_takes_its_patches_its_prompt_and_its_part_of_decode_steps() -> None:
    demand = demand_of([SimulatedRequest(0.0, 6, 11, (SMALL,))], ROUND)
    assert demand.tower_s == pytest.approx(0.016)
    assert demand.prefill_s == pytest.approx(0.010)
    assert demand.decode_s == pytest.approx(10 * 0.001)
    assert demand.nbytes == 400
    assert demand.distinct == 1.0


def test_a_picture_that_comes_again_is_sent_again_and_not_computed_again() -> None:
    demand = demand_of([SimulatedRequest(0.0, 6, 1, (SMALL,)), SimulatedRequest(1.0, 6, 1, (SMALL,))], ROUND)
    assert demand.tower_s == pytest.approx(0.008)
    assert demand.nbytes == 400
    assert demand.distinct == 0.5


def test_keys_and_pairs_are_counted() -> None:
    decoder = ROUND.decoder.model_copy(update={"per_key_s": 1e-3, "per_pair_s": 1e-3})
    demand = demand_of([SimulatedRequest(0.0, 4, 3, ())], ROUND.model_copy(update={"decoder": decoder}))
    assert demand.prefill_s == pytest.approx(0.004 + 0.010)  # 1 + 2 + 3 + 4 pairs
    assert demand.decode_s == pytest.approx(2 * (0.001 + 0.005))


@pytest.mark.parametrize(("rate", "seconds", "number"), [(10, 0.08, 1), (10, 0.081, 2), (40, 0.08, 4), (0.1, 0.001, 1)])
def test_gpus_are_busy_for_four_fifths_at_most(rate: float, seconds: float, number: int) -> None:
    assert num_gpus(rate, seconds, 0.8) == number


@pytest.mark.parametrize(("gbit", "named"), [(7.0, "10 Gbit"), (7.1, "25 Gbit"), (280.0, "400 Gbit"), (281.0, "CUDA")])
def test_the_network_has_three_tenths_to_spare(gbit: float, named: str) -> None:
    assert network_for(gbit).startswith(named)


def test_requests_have_the_rate_the_sizes_and_the_repetitions_that_were_asked_for() -> None:
    requests = Workload(50, 2, ((64, 32), (640, 320)), 7, 3, repeated=0.5).requests(40.0, seed=1)
    assert rate_of(requests) == pytest.approx(50, rel=0.1)
    assert {(len(each.pictures), each.num_text, each.num_generated) for each in requests} == {(2, 7, 3)}
    pictures = [picture for each in requests for picture in each.pictures]
    assert {(each.width, each.height) for each in pictures} == {(64, 32), (640, 320)}
    assert len({each.key for each in pictures}) / len(pictures) == pytest.approx(0.5, abs=0.05)


def test_a_part_of_the_requests_is_spread_evenly() -> None:
    requests = [SimulatedRequest(float(number), 1, 1, ()) for number in range(10)]
    assert [each.at for each in at_rate(requests, 0.5)] == [1, 3, 5, 7, 9]
    assert at_rate(requests, 1.0) == requests
    with pytest.raises(ValueError, match="two moments"):
        rate_of(requests[:1])


def test_other_gpus_and_models_are_scaled_and_say_so() -> None:
    measured, slower = costs_of("h200", "qwen3-vl-8b"), costs_of("a100-80gb", "qwen3-vl-8b")
    assert measured.source == "measured" and "not measured" in slower.source
    assert slower.tower.per_patch_s == pytest.approx(measured.tower.per_patch_s * 989 / 312)
    assert slower.decoder.decode_s[1] == pytest.approx(measured.decoder.decode_s[1] * 4.8 / 2.04)
    larger = costs_of("h200", "qwen3-vl-32b")
    assert larger.decoder.decode_s[1] == pytest.approx(measured.decoder.decode_s[1] * 31.2 / 6.95)
    assert larger.row_nbytes == 4 * 5120 * 2
