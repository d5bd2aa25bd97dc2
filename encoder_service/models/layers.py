"""The layers that towers of all families share. Parameter names are those of the checkpoints.

Shapes: P patches, C hidden size, H heads, D head dim, T tokens, W width of one merged block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.encoder_service.models.attention import packed_attention
from vitrine_vlm.encoder_service.models.config import VisionConfig
from vitrine_vlm.model_loading.checkpoint import CheckpointError

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(hidden_act: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that config.json names.

    Raises:
        CheckpointError: the function is not supported.
    """
    if hidden_act not in _ACTIVATIONS:
        raise CheckpointError(f"vision_config.hidden_act is {hidden_act!r}, supported are {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[hidden_act]


@dataclass(frozen=True)
class Segments:
    """Attention segments of one batch.

    cu_seqlens: bounds in patches, [num_segments + 1] int32 on the CPU. max_seqlen: patches in the longest segment.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int

    @classmethod
    def from_bounds(cls, cu_seqlens: torch.Tensor) -> Segments:
        return cls(cu_seqlens, int(cu_seqlens.diff().max()))


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of every patch's rotation angles, [P, 1, D] float32."""

    cos_P1D: torch.Tensor
    sin_P1D: torch.Tensor

    @classmethod
    def at(cls, positions_P2: torch.Tensor, head_dim: int, theta: float) -> Rotary:
        """Angles of patches at (row, column): a quarter of the head each, in the order [row, column, row, column]."""
        exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions_P2.device) / (head_dim // 2)
        inverse_frequencies = 1.0 / theta**exponents
        angles = (positions_P2[:, :, None].float() * inverse_frequencies).flatten(1).repeat(1, 2)
        return cls(angles.cos()[:, None], angles.sin()[:, None])

    def apply(self, x_PHD: torch.Tensor) -> torch.Tensor:
        """Rotates in float32 and returns x's dtype."""
        x = x_PHD.float()
        left, right = x.chunk(2, dim=-1)
        return (x * self.cos_P1D + torch.cat([-right, left], dim=-1) * self.sin_P1D).to(x_PHD.dtype)


class PatchProjection(nn.Module):
    """The weights as the checkpoint stores them: a Conv3d whose stride is its kernel size."""

    def __init__(self, config: VisionConfig, bias: bool) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, *kernel))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if bias else None


class PatchEmbed(nn.Module):
    """Turns patch rows into hidden states by one matrix product."""

    def __init__(self, config: VisionConfig, bias: bool) -> None:
        super().__init__()
        self.proj = PatchProjection(config, bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PC: torch.Tensor, segments: Segments, rotary: Rotary) -> torch.Tensor:
        q_PHD, k_PHD, v_PHD = self.qkv(x_PC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out_PHD = packed_attention(
            rotary.apply(q_PHD), rotary.apply(k_PHD), v_PHD, segments.cu_seqlens, segments.max_seqlen
        )
        projected: torch.Tensor = self.proj(out_PHD.flatten(1))
        return projected


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig, norm: Callable[[int], nn.Module], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size)
        self.norm2 = norm(config.hidden_size)
        self.attn = Attention(config)
        self.mlp = mlp

    def forward(self, x_PC: torch.Tensor, segments: Segments, rotary: Rotary) -> torch.Tensor:
        x_PC = x_PC + self.attn(self.norm1(x_PC), segments, rotary)
        out_PC: torch.Tensor = x_PC + self.mlp(self.norm2(x_PC))
        return out_PC


def linear_into(linear: nn.Linear, x: torch.Tensor, out: torch.Tensor) -> None:
    """Applies a linear layer and writes the result into `out`, which may be a slice of wider rows."""
    torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def check_packed(patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]], config: VisionConfig) -> None:
    """Raises ValueError where patches and grids do not belong together or to this tower."""
    check_packed_shapes(patches_PX, grid_thw, config.spatial_merge_size, config.patch_width)


def check_packed_shapes(
    patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]], merge: int, patch_width: int
) -> None:
    """Raises ValueError where patches and grids do not belong together, to this merge size or patch width."""
    for t, h, w in grid_thw:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(f"grid {(t, h, w)} is empty or does not split into {merge} x {merge} patches a token")
    expected = (sum(t * h * w for t, h, w in grid_thw), patch_width)
    if not grid_thw or tuple(patches_PX.shape) != expected:
        raise ValueError(f"patches have shape {tuple(patches_PX.shape)}, the grids {grid_thw} need {expected}")
