"""Qwen3-VL's vision tower as fused kernels; `qwen3_vl.py` has the plain tower.

Shapes: P patches with padding, X pixel values a patch, C hidden size, T tokens, W row width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.encoder_service.families.qwen3_vl import Merger, Mlp, Qwen3VLTower
from vitrine_vlm.encoder_service.gpu import kernels, norms
from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables
from vitrine_vlm.encoder_service.gpu.layers import AttentionBranch, FusedTower
from vitrine_vlm.encoder_service.gpu.linear import BlockLinears, Linear
from vitrine_vlm.encoder_service.gpu.residual import ResidualStream
from vitrine_vlm.encoder_service.models.layers import Block
from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention


class FusedQwen3VL(FusedTower):
    def __init__(self, tower: Qwen3VLTower, attention: PackedAttention, linears: BlockLinears) -> None:
        """
        Args:
            linears: makes the linear layers of the blocks.

        Raises:
            ValueError: the tower's activation has no fused form.
        """
        super().__init__(tower, "gelu_pytorch_tanh", window_tokens=0)
        config = tower.config
        self._positions_per_side = config.positions_per_side
        self._position_table = tower.pos_embed.weight
        self._layers: list[_Layer] = []
        shift = torch.zeros(config.hidden_size, device=self.device)
        for block in tower.blocks:
            assert isinstance(block, Block)
            self._layers.append(_Layer(block, attention, shift, linears))
            shift = self._layers[-1].shift_after
        self._deepstack: dict[int, _Merger] = {}
        for index, merger in zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True):
            assert isinstance(merger, Merger)
            self._deepstack[index] = _Merger(merger, self._layers[index].shift_after)
        self._merger = _Merger(tower.merger, shift)

    @torch.inference_mode()
    def run(
        self,
        patches_PX: torch.Tensor,
        tables: BatchTables,
        rows_TW: torch.Tensor,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        places, cos_sin = self._positions(len(patches_PX), tables)
        x_PC = self._patch_embed(patches_PX)
        kernels.add_position_embeddings(x_PC, self._position_table, places, self._positions_per_side)
        stream = ResidualStream(x_PC)
        # The main embedding first, then one part a deepstack layer, written in place side by side.
        main_TO, *deepstack_TO = rows_TW.split(self.out_hidden_size, dim=1)
        for index, layer in enumerate(self._layers):
            layer.run(stream, cos_sin, tables)
            if watch:
                watch(stream.value(layer.shift_after))
            if index in self._deepstack:
                place = self.deepstack_visual_indexes.index(index)
                self._deepstack[index].run(stream, tables, deepstack_TO[place])
        self._merger.run(stream, tables, main_TO)


class _Layer:
    def __init__(self, block: Block, attention: PackedAttention, shift: torch.Tensor, linears: BlockLinears) -> None:
        """shift: the biases that the residual stream lacks before this block, [C]; `shift_after`: behind it."""
        assert isinstance(block.mlp, Mlp)
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._fp8 = linears.fp8
        self._attend = AttentionBranch(block.attn, attention, linears)
        self._proj = linears.to_residual(block.attn.proj.weight)
        self._fc1 = linears.from_normed(block.mlp.linear_fc1.weight, block.mlp.linear_fc1.bias, "gelu_tanh")
        self._fc2 = linears.to_residual(block.mlp.linear_fc2.weight)
        self._shift_before = shift
        self._shift_between = shift + block.attn.proj.bias.float()
        self.shift_after = self._shift_between + block.mlp.linear_fc2.bias.float()

    def run(self, stream: ResidualStream, cos_sin: torch.Tensor, tables: BatchTables) -> None:
        """Adds the block's two branches to the residual stream, without their biases."""
        normed_PC = _layer_norm(stream, self._shift_before, self._norm1, tables, fp8=self._fp8)
        self._proj.add_to(stream, self._attend.over_frames(normed_PC, cos_sin, tables))
        normed_PC = _layer_norm(stream, self._shift_between, self._norm2, tables, fp8=self._fp8)
        self._fc2.add_to(stream, self._fc1(normed_PC))


class _Merger:
    def __init__(self, merger: Merger, shift: torch.Tensor) -> None:
        self._norm = merger.norm
        self._merged_size = merger.merged_size
        self._shift = shift
        self._fc1 = Linear(merger.linear_fc1.weight, merger.linear_fc1.bias)
        self._fc2 = Linear(merger.linear_fc2.weight, merger.linear_fc2.bias)

    def run(self, stream: ResidualStream, tables: BatchTables, out_TO: torch.Tensor) -> None:
        normed = _layer_norm(stream, self._shift, self._norm, tables)
        assert isinstance(normed, torch.Tensor)
        self._fc2.into(out_TO, self._fc1.gelu(normed.view(-1, self._merged_size)))


def _layer_norm(
    stream: ResidualStream, shift: torch.Tensor, norm: torch.nn.Module, tables: BatchTables, *, fp8: bool = False
) -> Rows:
    assert isinstance(norm, torch.nn.LayerNorm)
    return norms.layer_norm(stream, shift, norm.weight, norm.bias, tables.cu_seqlens, fp8=fp8)
