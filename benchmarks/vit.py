"""Vision towers of published dims with equal random weights: Vitrine's and transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from vitrine_vlm.encoder_service.families import Family, qwen2_5_vl, qwen3_vl
from vitrine_vlm.encoder_service.models import PlainTower
from vitrine_vlm.encoder_service.models.grids import GridTHW

# vision_config of Qwen/Qwen3-VL-8B-Instruct.
QWEN3_VL_8B: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

# vision_config of Qwen/Qwen2.5-VL-7B-Instruct.
QWEN2_5_VL_7B: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


@dataclass(frozen=True)
class VitPair:
    """Vitrine's plain tower and transformers' tower with equal weights, in bfloat16 on the GPU."""

    plain: PlainTower
    transformers: PreTrainedModel
    family: Family


def qwen3_vl_8b(device: torch.device) -> VitPair:
    """Returns seeded towers of Qwen3-VL-8B's dims."""
    config = Qwen3VLConfig(vision_config=QWEN3_VL_8B).vision_config
    with device:
        reference = Qwen3VLVisionModel._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return _with_equal_weights(qwen3_vl.FAMILY, QWEN3_VL_8B, reference)


def qwen2_5_vl_7b(device: torch.device) -> VitPair:
    """Returns seeded towers of Qwen2.5-VL-7B's dims."""
    config = Qwen2_5_VLConfig(vision_config=QWEN2_5_VL_7B).vision_config
    with device:
        reference = Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        return _with_equal_weights(qwen2_5_vl.FAMILY, QWEN2_5_VL_7B, reference)


def _with_equal_weights(family: Family, vision: dict[str, Any], reference: PreTrainedModel) -> VitPair:
    torch.manual_seed(0)
    draw_weights(reference)
    plain = family.build({"vision_config": vision}).to(torch.bfloat16).eval()
    plain.load_state_dict(reference.state_dict())
    return VitPair(plain, reference.eval(), family)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draws weights at scales that keep the residual stream from vanishing; turns gradients off."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif parameter.ndim == 1:
            parameter.uniform_(0.8, 1.2)
        elif "pos_embed" in name:
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)


def operations(vision: dict[str, Any], grid_thw: list[GridTHW]) -> float:
    """Returns the multiplications and additions in the matrix products and attention of a Qwen3-VL tower."""
    hidden, wide, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    num_patches = sum(t * h * w for t, h, w in grid_thw)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grid_thw)
    merged = hidden * vision["spatial_merge_size"] ** 2
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    layers = vision["depth"] * (2 * num_patches * (4 * hidden**2 + 2 * hidden * wide) + 4 * pairs * hidden)
    num_tokens = num_patches // vision["spatial_merge_size"] ** 2
    num_mergers = 1 + len(vision["deepstack_visual_indexes"])
    mergers = num_mergers * 2 * num_tokens * (merged**2 + merged * out)
    return float(layers + mergers + 2 * num_patches * patch * hidden)
