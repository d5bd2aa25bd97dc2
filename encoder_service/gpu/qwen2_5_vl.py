"""Qwen2.5-VL's vision tower as fused kernels; `models/qwen2_5_vl.py` is the plain twin.

Patches travel sorted by attention window, from the embedding to the merger.

Shapes: P patches with padding, X pixel values a patch, C hidden size, I intermediate size, T tokens, W row width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from encoder_service.gpu import kernels
from encoder_service.gpu.attention import PackedAttention
from encoder_service.gpu.batch_tables import BatchTables
from encoder_service.gpu.layers import EPS, AttentionBranch, FusedTower
from encoder_service.gpu.linear import Linear
from encoder_service.models.layers import Block
from encoder_service.models.qwen2_5_vl import GatedMlp, Qwen2_5VLTower, RMSNorm

# Matrix products want rows of 16 bytes; published towers have 3420 wide MLPs.
_WIDTH_MULTIPLE = 8


class FusedQwen2_5VL(FusedTower):
    def __init__(self, tower: Qwen2_5VLTower, attention: PackedAttention) -> None:
        """Raises ValueError for an activation that has no fused form."""
        config = tower.config
        super().__init__(tower, "silu", config.window_tokens)
        self._layers: list[_Layer] = []
        shift = torch.zeros(config.hidden_size, device=self.device)
        max_window = config.window_tokens**2 * config.merge_unit
        for index, block in enumerate(tower.blocks):
            assert isinstance(block, Block)
            windows_of = None if index in config.fullatt_block_indexes else max_window
            self._layers.append(_Layer(block, attention, shift, windows_of))
            shift = self._layers[-1].shift_after
        self._shift = shift
        self._merger_norm = tower.merger.ln_q
        self._merged_size = tower.merger.merged_size
        first, _, second = tower.merger.mlp
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        self._fc1 = Linear(first.weight, first.bias)
        self._fc2 = Linear(second.weight, second.bias)

    @torch.inference_mode()
    def run(self, patches_PX: torch.Tensor, tables: BatchTables, rows_TW: torch.Tensor) -> None:
        places, cos_sin = self._positions(len(patches_PX), tables)
        source_P = places[:, kernels.SOURCE_COLUMN].long()
        x_PC = self._patch_embed(patches_PX.index_select(0, source_P))
        for layer in self._layers:
            layer.run(x_PC, cos_sin, tables)
        normed_PC = _rms_norm(x_PC, self._shift, self._merger_norm, tables)
        merged_TO = self._fc2(self._fc1.gelu(normed_PC.view(-1, self._merged_size)))
        # Token by token to where it came from: padding comes from where it stands, so every row is written once.
        rows_TW.index_copy_(0, source_P[:: self.merge_unit] // self.merge_unit, merged_TO)


class _Layer:
    def __init__(self, block: Block, attention: PackedAttention, shift: torch.Tensor, max_window: int | None) -> None:
        """
        Args:
            shift: the biases the residual stream lacks before this block, [C]; `shift_after`: behind it.
            max_window: patches in the largest window; None for a layer that sees whole frames.
        """
        assert isinstance(block.mlp, GatedMlp)
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._max_window = max_window
        self._attend = AttentionBranch(block.attn, attention)
        self._proj = Linear(block.attn.proj.weight, None)
        gate, up, down = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
        width = -(-gate.out_features // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        padding = width - gate.out_features
        gate_up_weight = torch.cat([F.pad(each.weight, (0, 0, 0, padding)) for each in (gate, up)])
        gate_up_bias = torch.cat([F.pad(each.bias, (0, padding)) for each in (gate, up)])
        self._gate_up = Linear(gate_up_weight, gate_up_bias)
        self._down = Linear(F.pad(down.weight, (0, padding)), None)
        self._shift_before = shift
        self._shift_between = shift + block.attn.proj.bias.float()
        self.shift_after = self._shift_between + down.bias.float()

    def run(self, x_PC: torch.Tensor, cos_sin: torch.Tensor, tables: BatchTables) -> None:
        """Adds the block's two branches to the residual stream, without their biases."""
        normed_PC = _rms_norm(x_PC, self._shift_before, self._norm1, tables)
        if self._max_window is None:
            attended_PC = self._attend.over_frames(normed_PC, cos_sin, tables)
        else:
            attended_PC = self._attend.over_windows(normed_PC, cos_sin, tables, self._max_window)
        self._proj.add_to(x_PC, attended_PC)
        normed_PC = _rms_norm(x_PC, self._shift_between, self._norm2, tables)
        self._down.add_to(x_PC, kernels.gated_silu(self._gate_up(normed_PC)))


def _rms_norm(x_PC: torch.Tensor, shift: torch.Tensor, norm: nn.Module, tables: BatchTables) -> torch.Tensor:
    assert isinstance(norm, RMSNorm)
    return kernels.rms_norm(x_PC, shift, norm.weight, EPS, tables.cu_seqlens)
