"""Qwen3-VL, dense and MoE, which share their vision tower.

Shapes: P patches of all images, X pixel values a patch, C hidden size, T tokens, M merged width (C * merge_size ** 2),
O out_hidden_size, W row width (O * (1 + num_deepstack)).

Source: transformers 5.23 `models/qwen3_vl/modeling_qwen3_vl.py`, Qwen3VLVisionModel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.encoder_service.families.family import Family
from vitrine_vlm.encoder_service.families.processors import VOLUME_BOUND
from vitrine_vlm.encoder_service.models import grids
from vitrine_vlm.encoder_service.models.config import VisionConfig, integer, integers, shared_fields, vision_section
from vitrine_vlm.encoder_service.models.layers import Block, Rotary, Segments, activation, check_packed, linear_into
from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.model_loading.checkpoint import CheckpointError

if TYPE_CHECKING:
    from vitrine_vlm.encoder_service.gpu.layers import FusedTower
    from vitrine_vlm.encoder_service.gpu.linear import BlockLinears
    from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Qwen3VLVisionConfig(VisionConfig):
    """The fields of this family.

    num_position_embeddings: entries of the square position table.
    deepstack_visual_indexes: layers with a deepstack merger, ascending.
    """

    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def positions_per_side(self) -> int:
        return math.isqrt(self.num_position_embeddings)


def vision_config(vision: Mapping[str, Any]) -> Qwen3VLVisionConfig:
    """Reads a `vision_config`.

    Raises:
        CheckpointError: a field is missing or invalid.
    """
    deepstack = tuple(integers(vision, "deepstack_visual_indexes"))
    num_position_embeddings = integer(vision, "num_position_embeddings")
    parsed = Qwen3VLVisionConfig(
        **shared_fields(vision),
        num_position_embeddings=num_position_embeddings,
        deepstack_visual_indexes=deepstack,
    )
    if math.isqrt(num_position_embeddings) ** 2 != num_position_embeddings:
        raise CheckpointError(f"num_position_embeddings is {num_position_embeddings}, expected a square number")
    # transformers emits the layers in the tower's order, so only ascending indexes are unambiguous.
    if list(deepstack) != sorted(set(deepstack)) or any(not 0 <= index < parsed.depth for index in deepstack):
        raise CheckpointError(
            f"deepstack_visual_indexes are {list(deepstack)}, expected ascending numbers below depth {parsed.depth}"
        )
    return parsed


class Mlp(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, x_PC: torch.Tensor) -> torch.Tensor:
        out_PC: torch.Tensor = self.linear_fc2(self.act(self.linear_fc1(x_PC)))
        return out_PC


class Merger(nn.Module):
    """Merges the patches of a token. The main merger normalizes patches, those of deepstack whole merged tokens."""

    def __init__(self, config: Qwen3VLVisionConfig, norm_merged: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.merge_unit
        self.norm = nn.LayerNorm(self.merged_size if norm_merged else config.hidden_size, eps=_NORM_EPS)
        self.norm_merged = norm_merged
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, x_PC: torch.Tensor, out_TO: torch.Tensor) -> None:
        if self.norm_merged:
            x_TM = self.norm(x_PC.view(-1, self.merged_size))
        else:
            x_TM = self.norm(x_PC).view(-1, self.merged_size)
        # Exact GELU here: hidden_act is the MLP's only.
        linear_into(self.linear_fc2, F.gelu(self.linear_fc1(x_TM)), out_TO)


class Qwen3VLTower(PlainTower):
    config: Qwen3VLVisionConfig

    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__(config, patch_bias=True, deepstack_visual_indexes=config.deepstack_visual_indexes)
        # The usual initialization would import torch's compiler, 1.3 s, to fill a weight that is loaded anyway.
        self.pos_embed = nn.Embedding.from_pretrained(torch.empty(config.num_position_embeddings, config.hidden_size))
        self.blocks = nn.ModuleList(
            Block(config, lambda size: nn.LayerNorm(size, eps=_NORM_EPS), Mlp(config)) for _ in range(config.depth)
        )
        self.merger = Merger(config, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_merged=True) for _ in config.deepstack_visual_indexes
        )

    @torch.inference_mode()
    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        config = self.config
        check_packed(patches_PX, grid_thw, config)
        table = self.pos_embed.weight
        segments = Segments.from_bounds(grids.frame_cu_seqlens(grid_thw))
        positions_P2 = grids.patch_positions(grid_thw, config.spatial_merge_size).to(table.device)
        rotary = Rotary.at(positions_P2, config.head_dim, config.rope_theta)

        x_PC = self.patch_embed(patches_PX.to(table.device, table.dtype))
        x_PC = x_PC + self._position_embeddings(grid_thw).to(table.dtype)
        rows_TW = torch.empty(len(x_PC) // self.merge_unit, self.row_width, dtype=table.dtype, device=table.device)
        # The main embedding first, then one part a deepstack layer, written in place side by side.
        main_TO, *deepstack_TO = rows_TW.split(self.out_hidden_size, dim=1)
        for layer, block in enumerate(self.blocks):
            x_PC = block(x_PC, segments, rotary)
            if layer in self.deepstack_visual_indexes:
                place = self.deepstack_visual_indexes.index(layer)
                self.deepstack_merger_list[place](x_PC, deepstack_TO[place])
        self.merger(x_PC, main_TO)
        return rows_TW

    def _position_embeddings(self, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        """The learned table sampled at every patch, [P, C] float32."""
        table = self.pos_embed.weight
        entries_P4, weights_P4 = grids.interpolation_taps(
            grid_thw, self.config.spatial_merge_size, self.config.positions_per_side
        )
        taps_P4C = F.embedding(entries_P4.to(table.device), table)
        return (taps_P4C * weights_P4.to(table.device)[:, :, None]).sum(1)


def build(config: Mapping[str, Any]) -> Qwen3VLTower:
    """Makes the plain tower of a config.json.

    Raises:
        CheckpointError: a field of config.json is missing or invalid.
    """
    return Qwen3VLTower(vision_config(vision_section(config)))


def fuse(tower: PlainTower, attention: PackedAttention, linears: BlockLinears) -> FusedTower:
    """Makes the tower's fused form.

    Raises:
        ValueError: its activation has no fused form.
    """
    from vitrine_vlm.encoder_service.families.qwen3_vl_gpu import FusedQwen3VL  # needs Triton

    assert isinstance(tower, Qwen3VLTower)
    return FusedQwen3VL(tower, attention, linears)


FAMILY = Family(model_types=("qwen3_vl", "qwen3_vl_moe"), processor=VOLUME_BOUND, build=build, fuse=fuse)
