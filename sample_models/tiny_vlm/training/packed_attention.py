"""Attention over packed sequences for transformers' classes: without padding, in one call per batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

# transformers passes cu_seqlens only to implementations with "flash" in their name.
_NAME = "packed_flash"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes tower and decoder accept packed sequences, described by `cu_seq_lens_q` and `max_length_q`."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _no_mask)
    # Not set_attn_implementation, which searches a kernel package for every name with "flash" in it.
    model.config._attn_implementation = _NAME


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Returns no mask: cu_seqlens delimits the sequences."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal or full attention within each sequence.

    Args:
        query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim].

    Returns:
        The output [1, N, heads, head_dim], and no attention weights.
    """
    causal = bool(module.is_causal)
    groups = query.shape[1] // key.shape[1]
    q, k, v = (
        each[0].transpose(0, 1)
        for each in (query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    )
    attend = _attend_on_gpu if query.is_cuda else _attend_on_cpu
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling, causal).to(value.dtype).unsqueeze(0), None


def _attend_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Arguments and result are [N, heads, head_dim]."""
    q, k, v = (each.to(torch.bfloat16) for each in (q, k, v))
    window = (-1, 0) if causal else (-1, -1)
    packed = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window)
    assert isinstance(packed, torch.Tensor)
    return packed


def _attend_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    _longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    heads_first = (each.transpose(0, 1).split(lengths, dim=1) for each in (q, k, v))
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(each_q, each_k, each_v, is_causal=causal, scale=scale)
        for each_q, each_k, each_v in zip(*heads_first, strict=True)
    ]
    return torch.cat(pieces, dim=1).transpose(0, 1)
