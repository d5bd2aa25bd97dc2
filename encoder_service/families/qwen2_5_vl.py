"""Qwen2.5-VL. Most layers of its vision tower attend within windows, so its tokens are sorted by window.

Shapes: P patches of all images, X pixel values a patch, C hidden size, T tokens, O out_hidden_size, which is also the
row width.

Source: transformers 5.23 `models/qwen2_5_vl/modeling_qwen2_5_vl.py`, Qwen2_5_VisionTransformerPretrainedModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitrine_vlm.encoder_service.families.family import Family
from vitrine_vlm.encoder_service.families.processors import FRAME_BOUND
from vitrine_vlm.encoder_service.models import grids
from vitrine_vlm.encoder_service.models.config import VisionConfig, integer, integers, shared_fields, vision_section
from vitrine_vlm.encoder_service.models.layers import Block, Rotary, Segments, activation, check_packed
from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.model_loading.checkpoint import CheckpointError

if TYPE_CHECKING:
    from vitrine_vlm.encoder_service.gpu.layers import FusedTower
    from vitrine_vlm.encoder_service.gpu.linear import BlockLinears
    from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Qwen2_5VLVisionConfig(VisionConfig):
    """The fields of this family.

    window_size: side of an attention window in pixels.
    fullatt_block_indexes: layers that attend over a whole frame.
    """

    window_size: int
    fullatt_block_indexes: frozenset[int]

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


def vision_config(vision: Mapping[str, Any]) -> Qwen2_5VLVisionConfig:
    """Reads a `vision_config`.

    Raises:
        CheckpointError: a field is missing or invalid.
    """
    parsed = Qwen2_5VLVisionConfig(
        **shared_fields(vision),
        window_size=integer(vision, "window_size"),
        fullatt_block_indexes=frozenset(integers(vision, "fullatt_block_indexes")),
    )
    if parsed.window_tokens < 1:
        raise CheckpointError(
            f"window_size {parsed.window_size} is smaller than a merged token of "
            f"{parsed.patch_size * parsed.spatial_merge_size} pixels"
        )
    return parsed


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + _NORM_EPS)
        return self.weight * (x_float * scale).to(x.dtype)


class GatedMlp(nn.Module):
    def __init__(self, config: Qwen2_5VLVisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, x_PC: torch.Tensor) -> torch.Tensor:
        out_PC: torch.Tensor = self.down_proj(self.act(self.gate_proj(x_PC)) * self.up_proj(x_PC))
        return out_PC


class Merger(nn.Module):
    def __init__(self, config: Qwen2_5VLVisionConfig) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_size, self.merged_size),
            nn.GELU(),  # exact: hidden_act is the MLP's only
            nn.Linear(self.merged_size, config.out_hidden_size),
        )

    def forward(self, x_PC: torch.Tensor) -> torch.Tensor:
        out_TO: torch.Tensor = self.mlp(self.ln_q(x_PC).view(-1, self.merged_size))
        return out_TO


class Qwen2_5VLTower(PlainTower):
    config: Qwen2_5VLVisionConfig

    def __init__(self, config: Qwen2_5VLVisionConfig) -> None:
        super().__init__(config, patch_bias=False)
        self.blocks = nn.ModuleList(Block(config, RMSNorm, GatedMlp(config)) for _ in range(config.depth))
        self.merger = Merger(config)

    @torch.inference_mode()
    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        config = self.config
        check_packed(patches_PX, grid_thw, config)
        weight = self.patch_embed.proj.weight
        order_T, window_bounds = grids.window_order(grid_thw, config.spatial_merge_size, config.window_tokens)
        windows = Segments.from_bounds(window_bounds)
        # Window order keeps a frame's tokens together, so frame bounds hold in it too.
        frames = Segments.from_bounds(grids.frame_cu_seqlens(grid_thw))
        positions_P2 = grids.patch_positions(grid_thw, config.spatial_merge_size)
        rotary = Rotary.at(self._by_window(positions_P2, order_T).to(weight.device), config.head_dim, config.rope_theta)
        order_T = order_T.to(weight.device)

        x_PC = self._by_window(self.patch_embed(patches_PX.to(weight.device, weight.dtype)), order_T)
        for layer, block in enumerate(self.blocks):
            x_PC = block(x_PC, frames if layer in config.fullatt_block_indexes else windows, rotary)
        rows_TO = torch.empty(len(order_T), self.row_width, dtype=weight.dtype, device=weight.device)
        # Writing each token to its original place undoes the permutation.
        return rows_TO.index_copy_(0, order_T, self.merger(x_PC))

    def _by_window(self, x_P: torch.Tensor, order_T: torch.Tensor) -> torch.Tensor:
        return x_P.unflatten(0, (-1, self.merge_unit))[order_T].flatten(0, 1)


def build(config: Mapping[str, Any]) -> Qwen2_5VLTower:
    """Makes the plain tower of a config.json.

    Raises:
        CheckpointError: a field of config.json is missing or invalid.
    """
    return Qwen2_5VLTower(vision_config(vision_section(config)))


def fuse(tower: PlainTower, attention: PackedAttention, linears: BlockLinears) -> FusedTower:
    """Makes the tower's fused form.

    Raises:
        ValueError: its activation has no fused form.
    """
    from vitrine_vlm.encoder_service.families.qwen2_5_vl_gpu import FusedQwen2_5VL  # needs Triton

    assert isinstance(tower, Qwen2_5VLTower)
    return FusedQwen2_5VL(tower, attention, linears)


FAMILY = Family(model_types=("qwen2_5_vl",), processor=FRAME_BOUND, build=build, fuse=fuse)
