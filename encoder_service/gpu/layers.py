"""What the fused towers have in common.

Residual biases: the two products of a block that end in the residual stream add to it in place and leave their
biases out. So the stream lacks the sum of all biases so far, one constant vector for each place where it is read
(`shift`), and the norms add it as they read. That saves reading and writing the stream twice a block.
"""

from __future__ import annotations

from typing import Protocol

import torch

from encoder_service.gpu import kernels
from encoder_service.gpu.attention import PackedAttention
from encoder_service.gpu.batch_tables import BatchTables
from encoder_service.gpu.linear import Linear
from encoder_service.models.config import VisionConfig
from encoder_service.models.layers import Attention

EPS = 1e-6


class FusedTower(Protocol):
    """A whole tower as kernel launches that read nothing back, so that they can be captured as a CUDA graph."""

    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    row_width: int
    merge_unit: int
    merge_size: int
    patch_width: int
    window_tokens: int
    device: torch.device
    dtype: torch.dtype

    def run(self, patches_PX: torch.Tensor, tables: BatchTables, rows_TW: torch.Tensor) -> None:
        """Encodes a batch.

        Args:
            patches_PX: this tower's dtype; rows behind the last patch may hold anything finite.
            rows_TW: filled, [P / merge_unit, row_width]; rows of padding get garbage.
        """
        ...


class AttentionBranch:
    """From normed rows to what attention makes of them; the projection back is left to the caller."""

    def __init__(self, module: Attention, attention: PackedAttention) -> None:
        self._qkv = Linear(module.qkv.weight, module.qkv.bias)
        self._attention = attention
        self._num_heads = module.num_heads
        self._head_dim = module.proj.in_features // module.num_heads

    def over_frames(self, normed_PC: torch.Tensor, cos_sin: torch.Tensor, tables: BatchTables) -> torch.Tensor:
        """[P, C]; every patch sees its frame."""
        q, k, v = kernels.turn(self._qkv(normed_PC), cos_sin, self._num_heads, self._attention.padded_head_dim)
        return self._attention(q, k, v, tables.cu_seqlens, tables.max_seqlen, self._head_dim**-0.5).flatten(1)

    def over_windows(
        self, normed_PC: torch.Tensor, cos_sin: torch.Tensor, tables: BatchTables, max_length: int
    ) -> torch.Tensor:
        """[P, C]; every patch sees its window, which has at most `max_length` patches."""
        q, k, v = kernels.turn(self._qkv(normed_PC), cos_sin, self._num_heads, self._head_dim)
        scale = self._head_dim**-0.5
        return kernels.window_attention(q, k, v, tables.window_cu_seqlens, max_length, scale).flatten(1)


class Positions:
    """Where the patches of a batch lie, and the angles that follow from it."""

    def __init__(self, config: VisionConfig, window_tokens: int, device: torch.device) -> None:
        self._merge_size = config.spatial_merge_size
        self._window_tokens = window_tokens
        self._half_head = config.head_dim // 2
        # Of the rotary embedding along one axis, [head_dim / 4].
        steps = torch.arange(0, self._half_head, 2, dtype=torch.float32, device=device)
        self._inverse_frequencies = 1.0 / config.rope_theta ** (steps / self._half_head)

    def __call__(self, num_patches: int, tables: BatchTables) -> tuple[torch.Tensor, torch.Tensor]:
        """`places` and `cos_sin`, see `kernels.place_patches` and `kernels.rotary_table`; padding included."""
        device = self._inverse_frequencies.device
        places = torch.empty((num_patches, kernels.PLACE_WIDTH), dtype=torch.int32, device=device)
        kernels.place_patches(tables.cu_seqlens, tables.frame_hw, self._merge_size, self._window_tokens, places)
        cos_sin = torch.empty((num_patches, 2, self._half_head), dtype=torch.float32, device=device)
        kernels.rotary_table(places, self._inverse_frequencies, cos_sin)
        return places, cos_sin
