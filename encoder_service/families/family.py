"""The encoder's part of a family of vision-language checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.encoder_service.models.weights import VisualWeights
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorDefaults

if TYPE_CHECKING:
    from vitrine_vlm.encoder_service.gpu.layers import FusedTower
    from vitrine_vlm.encoder_service.gpu.linear import BlockLinears
    from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention


@dataclass(frozen=True)
class Family:
    """Checkpoints whose vision towers differ in sizes only.

    model_types: their `model_type` in config.json.
    processor: how their images and videos are prepared.
    build: makes the plain tower of a config.json, with weights of the right shapes; raises CheckpointError where a
        field is missing or invalid.
    fuse: makes a plain tower's fused form. It imports what needs Triton when it is called, not before; raises
        ValueError for an activation that has no fused form.
    weights: the names of the tower's tensors in a checkpoint.
    """

    model_types: tuple[str, ...]
    processor: ProcessorDefaults
    build: Callable[[Mapping[str, Any]], PlainTower]
    fuse: Callable[[PlainTower, PackedAttention, BlockLinears], FusedTower]
    weights: VisualWeights = field(default_factory=VisualWeights)
