"""Attention over packed sequences, whole frames or chunks of prompts, by the libraries that are installed.

Shapes: T queries, L keys, H query heads, K key/value heads, D head dim, E padded head dim.
"""

from __future__ import annotations

import logging
import warnings
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from vitrine_vlm.gpu_kernels.timing import graphed_median_ms

_log = logging.getLogger(__name__)
_PROBE_SEGMENTS, _PROBE_LENGTH = 8, 1225  # eight images of 560x560
_PROBE_REPEATS = 5


class Bounds(NamedTuple):
    """The bounds of the sequences in queries and keys.

    cu_queries, cu_keys: [sequences + 1] int32 on the GPU. Empty sequences are allowed; rows behind the last bound
    belong to none. max_queries, max_keys: of one sequence at most; they shape the launch, lengths are read on the GPU.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def of_self_attention(cls, cu_seqlens: torch.Tensor, max_seqlen: int) -> Bounds:
        """The bounds where each sequence attends to itself."""
        return cls(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


class PackedAttention(Protocol):
    """An implementation of attention over packed sequences. name: for logs and reports."""

    name: str

    def padded_head_dim(self, head_dim: int) -> int:
        """E: the head dim to which queries and keys are padded with zeros for speed."""
        ...

    def __call__(
        self,
        q_THE: torch.Tensor,
        k_LKE: torch.Tensor,
        v_LKD: torch.Tensor,
        bounds: Bounds,
        *,
        scale: float,
        causal: bool = False,
    ) -> torch.Tensor:
        """Softmax attention within each sequence.

        Args:
            scale: factor of the scores, usually D ** -0.5.
            causal: a sequence's last query attends to all of its keys, the one before to all but one, and so on.

        Returns:
            [T, H, D]; rows that belong to no sequence are not written.
        """
        ...


class FlashAttention4:
    """flash-attn-4. Queries and keys of 72 run faster padded to 80 (measured, docs/performance.md)."""

    name = "flash-attn-4"

    def __init__(self) -> None:
        """Raises ImportError where it is not installed."""
        # Its compiler warns about flash-attn's own arguments.
        warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
        from flash_attn.cute import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

    def padded_head_dim(self, head_dim: int) -> int:
        return -(-head_dim // 16) * 16

    def __call__(
        self,
        q_THE: torch.Tensor,
        k_LKE: torch.Tensor,
        v_LKD: torch.Tensor,
        bounds: Bounds,
        *,
        scale: float,
        causal: bool = False,
    ) -> torch.Tensor:
        out_THD: torch.Tensor = self._attend(
            q_THE,
            k_LKE,
            v_LKD,
            cu_seqlens_q=bounds.cu_queries,
            cu_seqlens_k=bounds.cu_keys,
            max_seqlen_q=bounds.max_queries,
            max_seqlen_k=bounds.max_keys,
            softmax_scale=scale,
            causal=causal,
        )[0]
        return out_THD


class TorchVarlen:
    """torch's FlashAttention-2, by the operator below `torch.nn.attention.varlen`."""

    name = "torch varlen"

    def padded_head_dim(self, head_dim: int) -> int:
        return head_dim

    def __call__(
        self,
        q_THE: torch.Tensor,
        k_LKE: torch.Tensor,
        v_LKD: torch.Tensor,
        bounds: Bounds,
        *,
        scale: float,
        causal: bool = False,
    ) -> torch.Tensor:
        attend = torch.ops.aten._flash_attention_forward
        dropout, debug_mask = 0.0, False
        out_THD: torch.Tensor = attend(q_THE, k_LKE, v_LKD, *bounds, dropout, causal, debug_mask, scale=scale)[0]
        return out_THD


class TorchSdpa:
    """torch's attention, sequence by sequence: for float32, which the others do not support."""

    name = "torch sdpa"

    def padded_head_dim(self, head_dim: int) -> int:
        return head_dim

    def __call__(
        self,
        q_THE: torch.Tensor,
        k_LKE: torch.Tensor,
        v_LKD: torch.Tensor,
        bounds: Bounds,
        *,
        scale: float,
        causal: bool = False,
    ) -> torch.Tensor:
        out_THD = q_THE.new_empty((*q_THE.shape[:2], v_LKD.shape[-1]))
        queries, keys = pairwise(bounds.cu_queries.tolist()), pairwise(bounds.cu_keys.tolist())
        for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in (q_THE[q0:q1], k_LKE[k0:k1], v_LKD[k0:k1]))
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device)
            mask = seen.tril(k1 - k0 - (q1 - q0)) if causal else None
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            out_THD[q0:q1] = attended[0].transpose(0, 1)
        return out_THD


def installed_attention(dtype: torch.dtype) -> PackedAttention:
    """flash-attn-4 for half precision where it is installed, else torch's own."""
    if dtype == torch.float32:
        return TorchSdpa()
    try:
        return FlashAttention4()
    except ImportError as error:
        _log.info("flash-attn-4 is not installed (%s): attention is slower without it", error)
        return TorchVarlen()


def autotuned_attention(num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """The fastest of those that are installed, measured on a batch of images; the log has the times."""
    candidates: list[PackedAttention] = [TorchVarlen()]
    if isinstance(installed := installed_attention(dtype), FlashAttention4):
        candidates.append(installed)
    times = {each: _time_ms(each, num_heads, head_dim, device, dtype) for each in candidates}
    report = ", ".join(f"{each.name} {ms:.3f} ms" for each, ms in times.items())
    best = min(candidates, key=times.__getitem__)
    _log.info("attention over %d x %d patches: %s; using %s", _PROBE_SEGMENTS, _PROBE_LENGTH, report, best.name)
    return best


def _time_ms(
    attention: PackedAttention, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> float:
    rows = (_PROBE_SEGMENTS * _PROBE_LENGTH, num_heads)
    q, k = torch.randn((2, *rows, attention.padded_head_dim(head_dim)), device=device, dtype=dtype).unbind()
    v = torch.randn((*rows, head_dim), device=device, dtype=dtype)
    cu_seqlens = torch.arange(_PROBE_SEGMENTS + 1, device=device, dtype=torch.int32) * _PROBE_LENGTH
    bounds = Bounds.of_self_attention(cu_seqlens, _PROBE_LENGTH)
    return graphed_median_ms(lambda: attention(q, k, v, bounds, scale=head_dim**-0.5), _PROBE_REPEATS)
