"""Qwen3-VL-8B in bfloat16 on one NVIDIA H200, as measured (docs/performance.md), as the policies' cost models."""

from __future__ import annotations

from vitrine_vlm.encoder_service.engine.cost_model import CostModel, Measurement
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.types import ModelIdentity

IDENTITY = ModelIdentity(
    model="Qwen3-VL-8B",
    revision="simulated",
    model_type="qwen3_vl",
    out_hidden_size=4096,
    deepstack_visual_indexes=(8, 16, 24),
    dtype="bfloat16",
)
PATCH_SIZE, MERGE_SIZE = 16, 2

# The tower: 560x560, 1280x720 and 1920x1080 pictures, one and several in a batch.
_TOWER = (
    Measurement(((1, 36, 36),), 3.24e-3),
    Measurement(((1, 36, 36),) * 32, 84.29e-3),
    Measurement(((1, 44, 80),), 10.63e-3),
    Measurement(((1, 44, 80),) * 8, 74.89e-3),
    Measurement(((1, 68, 120),) * 4, 125.34e-3),
)
# Opening takes reading a header and hashing; patches are decoded and cut on the GPU: 1.3 ms for 560x560 and 2.9 ms for
# 1920x1080 in all with one item in flight.
OPEN_S = 0.3e-3
PREPROCESS_S, PREPROCESS_A_PATCH_S = 0.7e-3, 0.23e-6

# The worker: steps that decode by their sequences, and steps with prompt tokens by their tokens.
_DECODE_S = {1: 4.6e-3, 16: 5.2e-3, 32: 6.1e-3, 64: 7.6e-3, 128: 9.8e-3}
_MIXED_S = {8: 4.9e-3, 128: 5.7e-3, 256: 8.0e-3, 512: 12.2e-3, 1024: 22.6e-3, 2048: 43.6e-3, 8192: 180e-3}
_PER_KEY_S, _PER_PAIR_S = 35e-9, 0.7e-9


def tower_cost() -> CostModel:
    """A new cost model of the tower, as an encoder has measured it at its start."""
    return CostModel.fit(_TOWER)


def step_costs(factor: float = 1.0) -> StepCosts:
    """A new cost model of a worker's steps. factor: of all seconds."""
    decode_s, mixed_s = ({size: factor * s for size, s in each.items()} for each in (_DECODE_S, _MIXED_S))
    return StepCosts(decode_s, mixed_s, factor * _PER_KEY_S, factor * _PER_PAIR_S)


def preprocess_s(num_patches: int) -> float:
    """Seconds until the patches of an opened item are there."""
    return PREPROCESS_S + PREPROCESS_A_PATCH_S * num_patches
