"""Qwen3-VL's vision tower, shared by its dense and MoE checkpoints.

Shapes: P patches of all images, X pixel values a patch, C hidden size, T tokens, M merged width (C * merge_size ** 2),
O out_hidden_size, W row width (O * (1 + num_deepstack)).

Source: transformers 5.23 `models/qwen3_vl/modeling_qwen3_vl.py`, Qwen3VLVisionModel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from encoder_service.models import grids
from encoder_service.models.config import Qwen3VLVisionConfig
from encoder_service.models.layers import (
    Block,
    PatchEmbed,
    Rotary,
    Segments,
    activation,
    check_packed,
    linear_into,
)

_NORM_EPS = 1e-6


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
    """Merges the patches of a token. The main one normalizes patches, deepstack's normalize whole merged tokens."""

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
        # Exact GELU here, whatever hidden_act says for the MLP.
        linear_into(self.linear_fc2, F.gelu(self.linear_fc1(x_TM)), out_TO)


class Qwen3VLTower(nn.Module):
    """A `VisionTower`; see the protocol in `encoder_service.models`."""

    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.deepstack_visual_indexes = config.deepstack_visual_indexes
        self.out_hidden_size = config.out_hidden_size
        self.row_width = config.out_hidden_size * (1 + len(config.deepstack_visual_indexes))
        self.merge_unit = config.merge_unit
        self.patch_embed = PatchEmbed(config, bias=True)
        # The usual initialization would import all of torch's compiler to fill a weight that is loaded anyway: 1.3 s.
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
        # Main block first, then one block a deepstack layer, written in place side by side.
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
