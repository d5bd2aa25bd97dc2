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
# Weight of the newest batch in the factor that corrects the measurements of the start.
_CORRECTION_RATE = 0.1
_CORRECTION_BOUNDS = (0.02, 50.0)


@dataclass(frozen=True)
class Measurement:
    """How long a batch of these grids took."""

    grid_thw: tuple[GridTHW, ...]
    seconds: float


class CostModel:
    """seconds = fixed + per_patch * patches + per_pair * pairs of patches that attend to each other."""

    def __init__(self, fixed_s: float, per_patch_s: float, per_pair_s: float) -> None:
        self.fixed_s, self.per_patch_s, self.per_pair_s = fixed_s, per_patch_s, per_pair_s
        self._correction = 1.0

    @classmethod
    def fit(cls, measured: Sequence[Measurement]) -> CostModel:
        """Fits the coefficients by least squares of relative errors, none of them negative.

        Raises:
            ValueError: nothing was measured.
        """
        if not measured:
            raise ValueError("a cost model needs at least one measurement")
        terms = np.array([(1.0, *_patches_and_pairs(each.grid_thw)) for each in measured])
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
        return cls(*(float(value) for value in coefficients))

    def seconds(self, grid_thw: GridTHW) -> float:
        """Seconds that one item adds to a batch."""
        patches, pairs = _patches_and_pairs((grid_thw,))
        return self._correction * (self.per_patch_s * patches + self.per_pair_s * pairs)

    def batch_seconds(self, grid_thw: Sequence[GridTHW]) -> float:
        """Seconds that a batch takes."""
        return self.fixed_s + sum(map(self.seconds, grid_thw))

    def observe(self, grid_thw: Sequence[GridTHW], seconds: float) -> None:
        """Corrects the model, slowly, by how long a batch really took."""
        expected = self.batch_seconds(grid_thw)
        if expected > 0:
            corrected = self._correction * (1 + _CORRECTION_RATE * (min(seconds / expected, 2.0) - 1))
            self._correction = min(max(corrected, _CORRECTION_BOUNDS[0]), _CORRECTION_BOUNDS[1])


def measure_cost(tower: VisionTower, patch_width: int, device: torch.device) -> CostModel:
    """Fits a cost model to batches of growing size, which takes about a second.

    Args:
        patch_width: pixel values of one patch.
    """
    measured: list[Measurement] = []
    for grid, count in _PROBES:
        grids = [grid] * count
        patches_PX = torch.zeros((math.prod(grid) * count, patch_width), device=device)
        seconds = _time(tower, patches_PX, grids)
        if seconds < _LONGEST_PROBE_S or not measured:
            # The first forward initializes what later ones use, and a pause of the machine must not count.
            seconds = min(seconds, _time(tower, patches_PX, grids))
        measured.append(Measurement(tuple(grids), seconds))
        if seconds > _LONGEST_PROBE_S:
            break
    cost = CostModel.fit(measured)
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


def _patches_and_pairs(grid_thw: Sequence[GridTHW]) -> tuple[float, float]:
    patches = sum(t * h * w for t, h, w in grid_thw)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grid_thw)
    return float(patches), float(pairs)
