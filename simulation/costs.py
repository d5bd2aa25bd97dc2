"""What a GPU takes, as the policies' cost models: Qwen3-VL-8B as measured on one NVIDIA H200, other GPUs by scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, TypeAlias

import numpy as np

from vitrine_vlm.encoder_service.engine.cost_model import CostModel, Measurement
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.types import ModelIdentity

DecoderWeights: TypeAlias = Literal["bf16", "fp8"]

IDENTITY = ModelIdentity(
    model="Qwen3-VL-8B",
    revision="simulated",
    model_type="qwen3_vl",
    out_hidden_size=4096,
    deepstack_visual_indexes=(8, 16, 24),
    dtype="bfloat16",
)
PATCH_SIZE, MERGE_SIZE = 16, 2

# The tower: 560x560, 1280x720 and 1920x1080 pictures, one and several in a batch (docs/performance.md).
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
# By how much FP8 weights with a scale a channel make a step faster, measured on 2026-11-30. The first of prompts is
# that of one decoded token: so few only read the weights.
_FP8_DECODE = {1: 1.29, 32: 1.15, 128: 1.10}
_FP8_PROMPT = {1: 1.29, 128: 1.15, 512: 1.63, 2048: 1.61, 8192: 1.54}


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU's data sheet. flops: dense bfloat16 operations a second; bytes_a_second: of its memory."""

    flops: float
    bytes_a_second: float


GPUS = {
    "h200": Gpu(989e12, 4.8e12),
    "b200": Gpu(2250e12, 8.0e12),
    "h100": Gpu(989e12, 3.35e12),
    "a100-80gb": Gpu(312e12, 2.04e12),
    "l40s": Gpu(362e12, 0.864e12),
}


class GpuCosts(Protocol):
    """What the GPUs of a fleet take. Each call returns a new model, because what uses it corrects it."""

    def tower_cost(self) -> CostModel:
        """The cost model of the tower, as an encoder has measured it at its start."""
        ...

    def real_tower_cost(self) -> CostModel:
        """What the tower takes, which the encoder learns only from its batches."""
        ...

    def step_costs(self) -> StepCosts:
        """The cost model of a worker's steps."""
        ...


@dataclass(frozen=True)
class Hardware:
    """`GpuCosts` of Qwen3-VL-8B. gpu: a name of GPUS; decoder: how the decoder's weights are stored.

    Only the H200 was measured. On another GPU the tower, and what prompt tokens add to a step, take as much longer as
    its operations a second are fewer; decoding, and reading the weights, as its memory is slower.
    """

    gpu: str = "h200"
    decoder: DecoderWeights = "bf16"

    @property
    def compute_factor(self) -> float:
        """By how much longer than on the H200 matrix products take."""
        return GPUS["h200"].flops / GPUS[self.gpu].flops

    @property
    def memory_factor(self) -> float:
        """By how much longer than on the H200 reading the memory takes."""
        return GPUS["h200"].bytes_a_second / GPUS[self.gpu].bytes_a_second

    def tower_cost(self) -> CostModel:
        factor, fitted = self.compute_factor, _fitted_tower()
        return CostModel(factor * fitted.fixed_s, factor * fitted.per_patch_s, factor * fitted.per_pair_s)

    def real_tower_cost(self) -> CostModel:
        """The same as `tower_cost`."""
        return self.tower_cost()

    def step_costs(self) -> StepCosts:
        compute, memory = self.compute_factor, self.memory_factor
        decode_s, mixed_s = _DECODE_S, _MIXED_S
        if self.decoder == "fp8":
            decode_s, mixed_s = _faster(decode_s, _FP8_DECODE), _faster(mixed_s, _FP8_PROMPT)
        weights_s = decode_s[1]
        return StepCosts(
            {size: memory * seconds for size, seconds in decode_s.items()},
            {size: memory * weights_s + compute * (seconds - weights_s) for size, seconds in mixed_s.items()},
            memory * _PER_KEY_S,
            compute * _PER_PAIR_S,
        )


MEASURED = Hardware()


def preprocess_s(num_patches: int) -> float:
    """Seconds until the patches of an opened item are there."""
    return PREPROCESS_S + PREPROCESS_A_PATCH_S * num_patches


def _faster(seconds: Mapping[int, float], factors: Mapping[int, float]) -> dict[int, float]:
    """The seconds divided by the factors; between measured sizes these lie straight over the sizes' logarithm."""
    sizes = [math.log2(size) for size in factors]
    values = list(factors.values())
    return {size: each / float(np.interp(math.log2(size), sizes, values)) for size, each in seconds.items()}


@cache
def _fitted_tower() -> CostModel:
    return CostModel.fit(_TOWER)
