"""Qwen2.5-VL's vision tower as fused kernels; `qwen2_5_vl.py` has the plain tower.

Patches are sorted by attention window from the embedding to the merger.

Shapes: P patches with padding, X pixel values a patch, C hidden size, I intermediate size, T tokens, W row width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.encoder_service.families.qwen2_5_vl import GatedMlp, Qwen2_5VLTower, RMSNorm
from vitrine_vlm.encoder_service.gpu import kernels, norms
from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables
from vitrine_vlm.encoder_service.gpu.layers import AttentionBranch, FusedTower
from vitrine_vlm.encoder_service.gpu.linear import BlockLinears, Linear
from vitrine_vlm.encoder_service.gpu.residual import ResidualStream
from vitrine_vlm.encoder_service.models.layers import Block
from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention

# Matrix products need rows of a multiple of 16 bytes, also in FP8; published towers have MLPs of width 3420.
_WIDTH_MULTIPLE = 16


class FusedQwen2_5VL(FusedTower):
    def __init__(self, tower: Qwen2_5VLTower, attention: PackedAttention, linears: BlockLinears) -> None:
        """
        Args:
            linears: makes the linear layers of the blocks.

        Raises:
            ValueError: the tower's activation has no fused form.
        """
        config = tower.config
        super().__init__(tower, "silu", config.window_tokens)
        self._layers: list[_Layer] = []
        shift = torch.zeros(config.hidden_size, device=self.device)
        max_window = config.window_tokens**2 * config.merge_unit
        for index, block in enumerate(tower.blocks):
            assert isinstance(block, Block)
            windows_of = None if index in config.fullatt_block_indexes else max_window
            self._layers.append(_Layer(block, attention, shift, windows_of, linears))
            shift = self._layers[-1].shift_after
        self._shift = shift
        self._merger_norm = tower.merger.ln_q
        self._merged_size = tower.merger.merged_size
        first, _, second = tower.merger.mlp
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        self._fc1 = Linear(first.weight, first.bias)
        self._fc2 = Linear(second.weight, second.bias)

    @torch.inference_mode()
    def run(
        self,
        patches_PX: torch.Tensor,
        tables: BatchTables,
        rows_TW: torch.Tensor,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        places, cos_sin = self._positions(len(patches_PX), tables)
        source_P = places[:, kernels.SOURCE_COLUMN].long()
        stream = ResidualStream(self._patch_embed(patches_PX.index_select(0, source_P)))
        for layer in self._layers:
            layer.run(stream, cos_sin, tables)
            if watch:
                watch(stream.value(layer.shift_after))
        normed_PC = _rms_norm(stream, self._shift, self._merger_norm, tables)
        assert isinstance(normed_PC, torch.Tensor)
        merged_TO = self._fc2(self._fc1.gelu(normed_PC.view(-1, self._merged_size)))
        # Each token goes to its original place; padding stays where it is, so every row is written once.
        rows_TW.index_copy_(0, source_P[:: self.merge_unit] // self.merge_unit, merged_TO)


class _Layer:
    def __init__(
        self,
        block: Block,
        attention: PackedAttention,
        shift: torch.Tensor,
        max_window: int | None,
        linears: BlockLinears,
    ) -> None:
        """
        Args:
            shift: biases that the residual stream lacks before this block, [C]; the attribute `shift_after`: behind it.
            max_window: patches in the largest window; None for a layer that attends over whole frames.
        """
        assert isinstance(block.mlp, GatedMlp)
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._max_window = max_window
        self._fp8 = linears.fp8
        self._attend = AttentionBranch(block.attn, attention, linears)
        self._proj = linears.to_residual(block.attn.proj.weight)
        gate, up, down = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
        width = -(-gate.out_features // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        padding = width - gate.out_features
        gate_up_weight = torch.cat([F.pad(each.weight, (0, 0, 0, padding)) for each in (gate, up)])
        gate_up_bias = torch.cat([F.pad(each.bias, (0, padding)) for each in (gate, up)])
        self._gate_up = linears.from_normed(gate_up_weight, gate_up_bias, "gated_silu")
        self._down = linears.to_residual(F.pad(down.weight, (0, padding)))
        self._shift_before = shift
        self._shift_between = shift + block.attn.proj.bias.float()
        self.shift_after = self._shift_between + down.bias.float()

    def run(self, stream: ResidualStream, cos_sin: torch.Tensor, tables: BatchTables) -> None:
        """Adds the block's two branches to the residual stream, without their biases."""
        normed_PC = _rms_norm(stream, self._shift_before, self._norm1, tables, fp8=self._fp8)
        if self._max_window is None:
            attended_PC = self._attend.over_frames(normed_PC, cos_sin, tables)
        else:
            attended_PC = self._attend.over_windows(normed_PC, cos_sin, tables, self._max_window)
        self._proj.add_to(stream, attended_PC)
        normed_PC = _rms_norm(stream, self._shift_between, self._norm2, tables, fp8=self._fp8)
        self._down.add_to(stream, self._gate_up(normed_PC))


def _rms_norm(
    stream: ResidualStream, shift: torch.Tensor, norm: nn.Module, tables: BatchTables, *, fp8: bool = False
) -> Rows:
    assert isinstance(norm, RMSNorm)
    return norms.rms_norm(stream, shift, norm.weight, tables.cu_seqlens, fp8=fp8)
