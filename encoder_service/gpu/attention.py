"""Packed variable-length attention on the GPU: whatever is installed, the fastest of it.

Shapes: P patches with padding, H heads, D head dim, E padded head dim.
"""

from __future__ import annotations

import logging
import warnings
from typing import Protocol

import torch

from gpu_kernels.timing import graphed_median_ms

_log = logging.getLogger(__name__)

_PROBE_SEGMENTS, _PROBE_LENGTH = 8, 1225  # eight pictures of 560x560
_PROBE_REPEATS = 5


class PackedAttention(Protocol):
    """name: as reported; padded_head_dim: E, what it wants queries and keys padded to with zeros."""

    name: str
    padded_head_dim: int

    def __call__(
        self,
        q_PHE: torch.Tensor,
        k_PHE: torch.Tensor,
        v_PHD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> torch.Tensor:
        """Softmax attention within each segment.

        Args:
            cu_seqlens: [S + 1] int32 on the GPU; empty segments are allowed, rows behind the last bound belong to none.
            max_seqlen: no segment is longer; it shapes the launch, the lengths themselves are read on the GPU.

        Returns:
            [P, H, D]; rows that belong to no segment are not written.
        """
        ...


class FlashAttention4:
    """flash-attn-4. Queries and keys of 72 run faster padded to 80 (measured, docs/performance.md)."""

    name = "flash-attn-4"

    def __init__(self, head_dim: int) -> None:
        """Raises ImportError where it is not installed."""
        # Its compiler warns about flash-attn's own arguments.
        warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
        from flash_attn.cute import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func
        self.padded_head_dim = -(-head_dim // 16) * 16

    def __call__(
        self,
        q_PHE: torch.Tensor,
        k_PHE: torch.Tensor,
        v_PHD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> torch.Tensor:
        out_PHD: torch.Tensor = self._attend(
            q_PHE,
            k_PHE,
            v_PHD,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
        )[0]
        return out_PHD


class TorchVarlen:
    """torch's own FlashAttention-2."""

    name = "torch varlen"

    def __init__(self, head_dim: int) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._attend = varlen_attn
        self.padded_head_dim = head_dim

    def __call__(
        self,
        q_PHE: torch.Tensor,
        k_PHE: torch.Tensor,
        v_PHD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> torch.Tensor:
        out_PHD = self._attend(q_PHE, k_PHE, v_PHD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)
        assert isinstance(out_PHD, torch.Tensor)
        return out_PHD


def fastest_attention(num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """Tries what is installed on a batch of pictures and takes the fastest; the log has the times."""
    candidates: list[PackedAttention] = [TorchVarlen(head_dim)]
    try:
        candidates.append(FlashAttention4(head_dim))
    except ImportError as error:
        _log.info("flash-attn-4 is not installed (%s): pictures are encoded faster with it", error)
    times = {each: _time_ms(each, num_heads, head_dim, device, dtype) for each in candidates}
    report = ", ".join(f"{each.name} {ms:.3f} ms" for each, ms in times.items())
    best = min(candidates, key=lambda each: times[each])
    _log.info("attention over %d x %d patches: %s; using %s", _PROBE_SEGMENTS, _PROBE_LENGTH, report, best.name)
    return best


def _time_ms(
    attention: PackedAttention, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> float:
    rows = (_PROBE_SEGMENTS * _PROBE_LENGTH, num_heads)
    q, k = torch.randn((2, *rows, attention.padded_head_dim), device=device, dtype=dtype).unbind()
    v = torch.randn((*rows, head_dim), device=device, dtype=dtype)
    bounds = torch.arange(_PROBE_SEGMENTS + 1, device=device, dtype=torch.int32) * _PROBE_LENGTH

    def once() -> None:
        attention(q, k, v, bounds, _PROBE_LENGTH, head_dim**-0.5)

    return graphed_median_ms(once, _PROBE_REPEATS)
