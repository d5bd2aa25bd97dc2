"""The cost model recovers known costs and follows drift."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import cast

import pytest
import torch

from vitrine_vlm.encoder_service.engine.cost_model import CostModel, Measurement, measure_cost
from vitrine_vlm.encoder_service.families import build_tower
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

FIXED_S, PER_PATCH_S, PER_PAIR_S = 0.002, 2e-6, 1e-10


def truth(grids: list[tuple[int, int, int]]) -> float:
    patches = sum(math.prod(grid) for grid in grids)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    return FIXED_S + PER_PATCH_S * patches + PER_PAIR_S * pairs


BATCHES = [[(1, 8, 8)], [(1, 16, 16)] * 8, [(1, 64, 64)], [(1, 64, 64)] * 4, [(2, 128, 128)]]


def test_known_costs_are_recovered() -> None:
    rng = random.Random(0)
    noisy = [Measurement(tuple(grids), truth(grids) * rng.uniform(0.99, 1.01)) for grids in BATCHES * 3]
    cost = CostModel.fit(noisy)
    assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.1)
    assert cost.per_patch_s == pytest.approx(PER_PATCH_S, rel=0.1)
    assert cost.per_pair_s == pytest.approx(PER_PAIR_S, rel=0.1)
    assert cost.seconds((1, 36, 36)) == pytest.approx(truth([(1, 36, 36)]) - FIXED_S, rel=0.1)


def test_no_term_is_negative() -> None:
    shrinking = [
        Measurement((grid,), seconds) for grid, seconds in (((1, 4, 4), 1.0), ((1, 16, 16), 0.9), ((1, 64, 64), 0.8))
    ]
    cost = CostModel.fit(shrinking)
    assert min(cost.fixed_s, cost.per_patch_s, cost.per_pair_s) >= 0
    assert CostModel.fit([Measurement(((1, 4, 4),), 0.016)]).seconds((1, 8, 8)) == pytest.approx(0.064)
    with pytest.raises(ValueError, match="at least one"):
        CostModel.fit([])


def test_it_follows_a_tower_that_has_become_slower() -> None:
    cost = CostModel(FIXED_S, PER_PATCH_S, PER_PAIR_S)
    before = cost.seconds((1, 64, 64))
    for _ in range(200):
        cost.observe([(1, 64, 64)], 2 * truth([(1, 64, 64)]))
    assert cost.seconds((1, 64, 64)) == pytest.approx(2 * before)
    for _ in range(200):
        cost.observe([(1, 64, 64)], 0.1 * truth([(1, 64, 64)]))
    assert cost.seconds((1, 64, 64)) == pytest.approx(0.1 * before)


def test_the_first_batches_correct_what_a_busy_machine_measured() -> None:
    cost = CostModel(22 * FIXED_S, 22 * PER_PATCH_S, 22 * PER_PAIR_S, provisional_batches=3)
    batch = [(1, 64, 64)]
    cost.observe(batch, 22 * truth(batch))  # still busy
    cost.observe(batch, truth(batch))
    assert cost.batch_seconds(batch) == pytest.approx(truth(batch))
    cost.observe(batch, 2 * truth(batch))
    assert cost.batch_seconds(batch) < 1.1 * truth(batch)
    assert not cost.is_provisional
    cost.observe(batch, 0.5 * truth(batch))
    assert cost.batch_seconds(batch) > 0.9 * truth(batch)


@pytest.fixture
def tower(qwen3_vl_folder: Path) -> VisionTower:
    return build_tower(open_checkpoint(str(qwen3_vl_folder)), torch.device("cpu"), torch.float32)


class _PausedTower:
    """A tower on a machine that pauses for 0.2 s in every third forward or so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._rng = random.Random(0)

    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        self.now += truth(grid_thw) + (0.2 if self._rng.random() < 0.3 else 0.0)
        return patches_PX


def test_pauses_of_the_machine_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = _PausedTower()
    monkeypatch.setattr(time, "perf_counter", lambda: paused.now)
    cost = measure_cost(cast(VisionTower, paused), 3, torch.device("cpu"))
    assert cost.is_provisional
    for grid in ((1, 16, 16), (1, 32, 32), (1, 64, 64)):
        assert cost.batch_seconds([grid]) == pytest.approx(truth([grid]), rel=0.1)


def test_a_real_tower_is_measured(tower: VisionTower) -> None:
    cost = measure_cost(tower, 3 * 2 * 16 * 16, torch.device("cpu"))
    assert 0 < cost.seconds((1, 16, 16)) < cost.seconds((1, 64, 64)) < 60
