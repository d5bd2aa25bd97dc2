"""What makes a family of vision-language checkpoints, as far as the encoder is concerned."""

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

    model_types: config.json's words for them.
    processor: how their images and videos are prepared.
    build: the plain tower that config.json asks for, with weights of the right shapes; raises CheckpointError where
        a field is missing or makes no sense.
    fuse: a plain tower of the family as fused kernels. It imports what needs Triton when it is called, not before;
        raises ValueError for an activation that has no fused form.
    weights: where a checkpoint has the tower's tensors.
    """

    model_types: tuple[str, ...]
    processor: ProcessorDefaults
    build: Callable[[Mapping[str, Any]], PlainTower]
    fuse: Callable[[PlainTower, PackedAttention, BlockLinears], FusedTower]
    weights: VisualWeights = field(default_factory=VisualWeights)
