"""Causal attention of prompt chunks to their sequences' past and themselves, over contexts packed side by side.

Shapes: T queries, L keys of all contexts, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import logging
import warnings
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

_log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """Of the sequences among queries and keys.

    cu_queries, cu_keys: [sequences + 1] int32 on the GPU; max_queries, max_keys: of one sequence.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int


class CausalVarlen(Protocol):
    """name: as reported."""

    name: str

    def __call__(self, q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Softmax attention, scaled by D ** -0.5; a sequence's last query sees all of its keys, the one before all but
        one, and so on.

        Returns:
            [T, H, D].
        """
        ...


class FlashAttention4:
    name = "flash-attn-4"

    def __init__(self) -> None:
        """Raises ImportError where it is not installed."""
        # Its compiler warns about flash-attn's own arguments.
        warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
        from flash_attn.cute import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

    def __call__(self, q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        out_THD: torch.Tensor = self._attend(
            q_THD,
            k_LKD,
            v_LKD,
            cu_seqlens_q=bounds.cu_queries,
            cu_seqlens_k=bounds.cu_keys,
            max_seqlen_q=bounds.max_queries,
            max_seqlen_k=bounds.max_keys,
            causal=True,
        )[0]
        return out_THD


class TorchVarlen:
    """torch's own FlashAttention-2."""

    name = "torch varlen"

    def __call__(self, q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        attend = torch.ops.aten._flash_attention_forward
        out_THD: torch.Tensor = attend(q_THD, k_LKD, v_LKD, *bounds, 0.0, True, False)[0]
        return out_THD


class TorchSdpa:
    """torch's attention, sequence by sequence: for float32, which the others do not take."""

    name = "torch sdpa"

    def __call__(self, q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        out_THD = torch.empty_like(q_THD)
        queries, keys = pairwise(bounds.cu_queries.tolist()), pairwise(bounds.cu_keys.tolist())
        for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in (q_THD[q0:q1], k_LKD[k0:k1], v_LKD[k0:k1]))
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(k1 - k0 - (q1 - q0))
            out_THD[q0:q1] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        return out_THD


def causal_attention(dtype: torch.dtype) -> CausalVarlen:
    """In half precision flash-attn-4 where it is installed, else torch's own."""
    if dtype == torch.float32:
        return TorchSdpa()
    try:
        return FlashAttention4()
    except ImportError as error:
        _log.info("flash-attn-4 is not installed (%s): prompts run faster with it", error)
        return TorchVarlen()
