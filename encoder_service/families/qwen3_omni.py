"""Qwen3-Omni's vision tower: Qwen3-VL's, inside the thinker, with other names for its mergers. Audio is not served.

Source: transformers 5.23 `models/qwen3_omni_moe/modeling_qwen3_omni_moe.py` (Qwen3OmniMoeVisionEncoder) and
`processing_qwen3_omni_moe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitrine_vlm.encoder_service.families import qwen3_vl
from vitrine_vlm.encoder_service.families.family import Family
from vitrine_vlm.encoder_service.families.processors import FRAME_BOUND
from vitrine_vlm.encoder_service.families.qwen3_vl import Qwen3VLTower
from vitrine_vlm.encoder_service.models.config import vision_section
from vitrine_vlm.encoder_service.models.weights import VisualWeights
from vitrine_vlm.model_loading.checkpoint import CheckpointError


def build(config: Mapping[str, Any]) -> Qwen3VLTower:
    """Makes the plain tower of a config.json.

    Raises:
        CheckpointError: a field of config.json is missing or invalid.
    """
    thinker = config.get("thinker_config")
    if not isinstance(thinker, Mapping):
        raise CheckpointError("config.json has no thinker_config, which holds this family's vision_config")
    return Qwen3VLTower(qwen3_vl.vision_config(vision_section(thinker)))


FAMILY = Family(
    model_types=("qwen3_omni_moe",),
    processor=replace(
        FRAME_BOUND,
        # Qwen3OmniMoeProcessor passes these bounds to the video processor in every call, whatever its file says.
        video_fixed={"size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}},
        video_pixels_old_spelling=False,
    ),
    build=build,
    fuse=qwen3_vl.fuse,
    weights=VisualWeights(
        prefixes=("thinker.visual.",),
        renamed=(
            ("merger_list.", "deepstack_merger_list."),
            (".ln_q.", ".norm."),
            (".mlp.0.", ".linear_fc1."),
            (".mlp.2.", ".linear_fc2."),
        ),
    ),
)
