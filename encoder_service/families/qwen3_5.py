"""Qwen3.5, dense and MoE (Qwen3.6 is of the same classes), and Qwen4-Exp: Qwen3-VL's tower without deepstack.

Source: transformers 5.23 `models/qwen3_5/modeling_qwen3_5.py` (Qwen3_5VisionModel), `models/qwen3_5_moe` and
`models/qwen4_exp`, which have the same tower; their processors are Qwen3-VL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrine_vlm.encoder_service.families import qwen3_vl
from vitrine_vlm.encoder_service.families.family import Family
from vitrine_vlm.encoder_service.families.processors import VOLUME_BOUND
from vitrine_vlm.encoder_service.families.qwen3_vl import Qwen3VLTower
from vitrine_vlm.encoder_service.models.config import vision_section


def build(config: Mapping[str, Any]) -> Qwen3VLTower:
    """Makes the plain tower of a config.json.

    Raises:
        CheckpointError: a field of config.json is missing or invalid.
    """
    # The class has no deepstack, even if a config.json still has Qwen3-VL's field.
    return Qwen3VLTower(qwen3_vl.vision_config({**vision_section(config), "deepstack_visual_indexes": []}))


FAMILY = Family(
    model_types=("qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    processor=VOLUME_BOUND,
    build=build,
    fuse=qwen3_vl.fuse,
)
