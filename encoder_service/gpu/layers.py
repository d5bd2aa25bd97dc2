"""The parts that the fused towers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from vitrine_vlm.encoder_service.gpu import kernels
from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables
from vitrine_vlm.encoder_service.gpu.linear import BlockLinears, Linear
from vitrine_vlm.encoder_service.models.config import VisionConfig
from vitrine_vlm.encoder_service.models.layers import Attention
from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.packed_attention import Bounds, PackedAttention
from vitrine_vlm.gpu_kernels.rotary import apply_rope, rope_table


class Positions:
    """Computes the places of a batch's patches and their rotation angles."""

    def __init__(self, config: VisionConfig, window_tokens: int, device: torch.device) -> None:
        self._merge_size = config.spatial_merge_size
        self._window_tokens = window_tokens
        self._half_head = config.head_dim // 2
        # A quarter of the head is rotated by the row, another by the column, at the same frequencies.
        steps = torch.arange(0, self._half_head, 2, dtype=torch.float32, device=device)
        self._inverse_frequencies = (1.0 / config.rope_theta ** (steps / self._half_head)).repeat(2)
        self._axis = torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(len(steps))

    def __call__(self, num_patches: int, tables: BatchTables) -> tuple[torch.Tensor, torch.Tensor]:
        """`places` and `cos_sin`, see `kernels.place_patches` and `rope_table`; padding included."""
        device = self._inverse_frequencies.device
        places = torch.empty((num_patches, kernels.PLACE_WIDTH), dtype=torch.int32, device=device)
        kernels.place_patches(tables.cu_seqlens, tables.frame_hw, self._merge_size, self._window_tokens, places)
        cos_sin = torch.empty((num_patches, 2, self._half_head), dtype=torch.float32, device=device)
        rope_table(places[:, :2].T, self._inverse_frequencies, self._axis, cos_sin)
        return places, cos_sin


class FusedTower(ABC):
    """A whole tower as kernel launches that read nothing back, so that they can be captured as a CUDA graph."""

    def __init__(self, tower: PlainTower, fused_act: str, window_tokens: int) -> None:
        """
        Args:
            tower: the plain tower, on the GPU, bfloat16; its weights are shared where their layout allows it.
            fused_act: the only activation that this family's kernels have.
            window_tokens: side of an attention window in tokens; 0 for a tower without windows.

        Raises:
            ValueError: the tower has another activation.
        """
        config = tower.config
        if config.hidden_act != fused_act:
            raise ValueError(f"vision_config.hidden_act is {config.hidden_act!r}: only {fused_act} is fused")
        self.out_hidden_size = tower.out_hidden_size
        self.deepstack_visual_indexes = tower.deepstack_visual_indexes
        self.row_width = tower.row_width
        self.merge_unit = tower.merge_unit
        self.merge_size = config.spatial_merge_size
        self.patch_width = config.patch_width
        self.window_tokens = window_tokens
        patch = tower.patch_embed.proj
        self.device, self.dtype = patch.weight.device, patch.weight.dtype
        self._positions = Positions(config, window_tokens, self.device)
        self._patch_embed = Linear(patch.weight.flatten(1), patch.bias)

    @abstractmethod
    def run(
        self,
        patches_PX: torch.Tensor,
        tables: BatchTables,
        rows_TW: torch.Tensor,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Encodes a batch.

        Args:
            patches_PX: this tower's dtype; rows behind the last patch may hold anything finite.
            rows_TW: filled, [P / merge_unit, row_width]; rows of padding are undefined.
            watch: called with the residual stream behind every block, [P, C] float32.
        """


class AttentionBranch:
    """Attention over normed rows, without the projection back to the residual stream."""

    def __init__(self, module: Attention, attention: PackedAttention, linears: BlockLinears) -> None:
        self._qkv = linears.from_normed(module.qkv.weight, module.qkv.bias)
        self._attention = attention
        self._num_heads = module.num_heads
        self._head_dim = module.proj.in_features // module.num_heads

    def over_frames(self, normed_PC: Rows, cos_sin: torch.Tensor, tables: BatchTables) -> torch.Tensor:
        """Attention of every patch over its frame, [P, C]."""
        q, k, v = self._rotated(normed_PC, cos_sin, self._attention.padded_head_dim(self._head_dim))
        bounds = Bounds.of_self_attention(tables.cu_seqlens, tables.max_seqlen)
        return self._attention(q, k, v, bounds, scale=self._head_dim**-0.5).flatten(1)

    def over_windows(
        self, normed_PC: Rows, cos_sin: torch.Tensor, tables: BatchTables, max_length: int
    ) -> torch.Tensor:
        """Attention of every patch over its window of at most `max_length` patches, [P, C]."""
        q, k, v = self._rotated(normed_PC, cos_sin, self._head_dim)
        scale = self._head_dim**-0.5
        return kernels.window_attention(q, k, v, tables.window_cu_seqlens, max_length, scale).flatten(1)

    def _rotated(
        self, normed_PC: Rows, cos_sin: torch.Tensor, padded_head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = self._qkv(normed_PC)
        assert isinstance(qkv, torch.Tensor)
        return apply_rope(qkv, cos_sin, self._num_heads, padded_head_dim)
