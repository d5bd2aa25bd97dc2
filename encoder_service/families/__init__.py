"""The families of checkpoints that the encoder serves: one file each, which alone has what is special to the family.

docs/add_a_model_family.md says how one is added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.encoder_service.families import qwen2_5_vl, qwen3_5, qwen3_omni, qwen3_vl
from vitrine_vlm.encoder_service.families.family import Family
from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.encoder_service.models.weights import load_visual_weights
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError
from vitrine_vlm.model_loading.dummy_weights import draw_dummy_weights

__all__ = ["FAMILIES", "Family", "build_tower", "family_of", "processor_settings"]

FAMILIES = (qwen3_vl.FAMILY, qwen3_5.FAMILY, qwen3_omni.FAMILY, qwen2_5_vl.FAMILY)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of the checkpoint's model type.

    Raises:
        CheckpointError: no family has this model type.
    """
    model_type = checkpoint.config["model_type"]
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    served = ", ".join(each for family in FAMILIES for each in family.model_types)
    raise CheckpointError(f"model_type {model_type!r} has no vision tower here; supported are {served}")


def processor_settings(checkpoint: Checkpoint) -> ProcessorSettings:
    """How images and videos are prepared for the checkpoint.

    Raises:
        CheckpointError: see `family_of` and `ProcessorSettings.from_checkpoint`.
    """
    return ProcessorSettings.from_checkpoint(checkpoint, family_of(checkpoint).processor)


def build_tower(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> PlainTower:
    """The checkpoint's vision tower with its weights or dummies, a `VisionTower`; it reads no language tensor.

    Raises:
        CheckpointError: no family has the model type, or the weights do not match config.json.
    """
    family = family_of(checkpoint)
    with torch.device("meta"):
        tower = family.build(checkpoint.config)
    if checkpoint.load_format == "dummy":
        draw_dummy_weights(tower, checkpoint, device, dtype, on_progress)
    else:
        load_visual_weights(tower, checkpoint, family.weights, device, dtype, on_progress)
    return tower.eval()
