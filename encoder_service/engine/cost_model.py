"""Predicts how long the tower takes: admission and scaling count seconds of work, not requests."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW

_log = logging.getLogger(__name__)

# Batches that are measured at start-up, until one takes longer than _LONGEST_PROBE_S. The first is large enough that
# the fixed cost of a forward is not taken for the cost of a patch.
_PROBES: tuple[tuple[GridTHW, int], ...] = (
    ((1, 16, 16), 1),
    ((1, 16, 16), 4),
    ((1, 32, 32), 1),
    ((1, 32, 32), 4),
    ((1, 64, 64), 1),
    ((1, 64, 64), 4),
    ((1, 128, 128), 1),
)
_LONGEST_PROBE_S = 0.1
# Each probe counts as the least of what it took in so many rounds: a machine that is busy otherwise only adds time.
# Rounds, and not one repetition behind the other, because a pause of the machine would last through all of these.
_ROUNDS = 4
# After this time no further round begins, except for the second: the first forward initializes what later ones use.
_MEASURE_S = 1.0
# So many batches after a start are like further rounds: one that took less than expected corrects the model at once.
_PROVISIONAL_BATCHES = 8
# Weight of the newest batch in the factor that corrects the measurements of the start.
_CORRECTION_RATE = 0.1
_CORRECTION_BOUNDS = (0.02, 50.0)


@dataclass(frozen=True)
class Measurement:
    """How long a batch of these grids took."""

    grid_thw: tuple[GridTHW, ...]
    seconds: float


class CostModel:
    """seconds = correction * (fixed + per_patch * patches + per_pair * pairs of patches that attend to each other).

    correction: a factor by the batches that have run.

    Args:
        provisional_batches: batches until the model is no longer provisional; 0 for one that may be relied on.
    """

    def __init__(self, fixed_s: float, per_patch_s: float, per_pair_s: float, *, provisional_batches: int = 0) -> None:
        self.fixed_s, self.per_patch_s, self.per_pair_s = fixed_s, per_patch_s, per_pair_s
        self.correction = 1.0
        self._provisional_batches = provisional_batches

    @classmethod
    def fit(cls, measured: Sequence[Measurement], *, provisional_batches: int = 0) -> CostModel:
        """Fits the coefficients by least squares of relative errors, none of them negative.

        Raises:
            ValueError: nothing was measured.
        """
        if not measured:
            raise ValueError("a cost model needs at least one measurement")
        terms = np.array([(1.0, *np.sum([*map(_patches_and_pairs, each.grid_thw)], axis=0)) for each in measured])
        seconds = np.array([each.seconds for each in measured])
        used = [1] if len(measured) < 3 else [0, 1, 2]
        while True:
            weighted = terms[:, used] / seconds[:, None]
            scale = np.abs(weighted).max(axis=0)
            solution = np.linalg.lstsq(weighted / scale, np.ones(len(seconds)), rcond=None)[0] / scale
            negative = [term for term, value in zip(used, solution, strict=True) if value < 0]
            if not negative:
                break
            used.remove(max(negative))
        coefficients = np.zeros(3)
        coefficients[used] = solution
        return cls(*(float(value) for value in coefficients), provisional_batches=provisional_batches)

    @property
    def is_provisional(self) -> bool:
        """Whether too few batches have run to tell whether the measurements of the start were disturbed."""
        return self._provisional_batches > 0

    def uncorrected_seconds(self, grid_thw: GridTHW) -> float:
        """Seconds that one item adds to a batch, by the measurements of the start alone."""
        patches, pairs = _patches_and_pairs(grid_thw)
        return self.per_patch_s * patches + self.per_pair_s * pairs

    def seconds(self, grid_thw: GridTHW) -> float:
        """Seconds that one item adds to a batch."""
        return self.correction * self.uncorrected_seconds(grid_thw)

    def batch_seconds(self, grid_thw: Sequence[GridTHW]) -> float:
        """Seconds that a batch takes."""
        return self.correction * self.fixed_s + sum(map(self.seconds, grid_thw))

    def observe(self, grid_thw: Sequence[GridTHW], seconds: float) -> None:
        """Corrects the model by how long a batch really took: slowly, but the first ones may lower it at once."""
        expected = self.batch_seconds(grid_thw)
        if expected > 0:
            ratio = min(seconds / expected, 2.0)
            rate = 1.0 if self.is_provisional and ratio < 1.0 else _CORRECTION_RATE
            corrected = self.correction * (1 + rate * (ratio - 1))
            self.correction = min(max(corrected, _CORRECTION_BOUNDS[0]), _CORRECTION_BOUNDS[1])
        self._provisional_batches = max(0, self._provisional_batches - 1)


def measure_cost(tower: VisionTower, patch_width: int, device: torch.device) -> CostModel:
    """Fits a cost model to batches of growing size, which takes about a second; it is provisional.

    Args:
        patch_width: pixel values of one patch.
    """
    least_s: dict[tuple[GridTHW, int], float] = {}
    started = time.perf_counter()
    for num_round in range(_ROUNDS):
        if num_round >= 2 and time.perf_counter() - started > _MEASURE_S:
            break
        for grid, count in _PROBES:
            patches_PX = torch.zeros((math.prod(grid) * count, patch_width), device=device)
            seconds = min(_time(tower, patches_PX, [grid] * count), least_s.get((grid, count), math.inf))
            least_s[grid, count] = seconds
            if seconds > _LONGEST_PROBE_S:
                break
    measured = [Measurement((grid,) * count, seconds) for (grid, count), seconds in least_s.items()]
    cost = CostModel.fit(measured, provisional_batches=_PROVISIONAL_BATCHES)
    _log.info(
        "cost of a batch: %.2g s + %.3g s a patch + %.3g s a pair", cost.fixed_s, cost.per_patch_s, cost.per_pair_s
    )
    return cost


def _time(tower: VisionTower, patches_PX: torch.Tensor, grids: list[GridTHW]) -> float:
    start = time.perf_counter()
    rows_TW = tower.forward(patches_PX, grids)
    if rows_TW.is_cuda:
        torch.cuda.synchronize(rows_TW.device)
    return time.perf_counter() - start


def _patches_and_pairs(grid_thw: GridTHW) -> tuple[int, int]:
    """Of one item."""
    t, h, w = grid_thw
    patches = h * w
    return t * patches, t * patches**2
