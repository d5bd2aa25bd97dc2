"""Causal attention over a paged KV cache, in plain torch.

Shapes: T tokens of the step, H query heads, K key/value heads, D head dim, B sequences, L longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's share of a step.

    start, length: its tokens among the step's; context_length: tokens with KV after the step, these included.
    slots: cache slot of each of them in order, [context_length] int64.
    """

    start: int
    length: int
    context_length: int
    slots: torch.Tensor


def paged_attention(
    q_THD: torch.Tensor, k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor, sequences: Sequence[SequenceSlice]
) -> torch.Tensor:
    """Attention of the step's queries to their own sequence's past and themselves, scaled by D ** -0.5.

    Args:
        q_THD: queries; the sequences' slices follow one another and cover all of them.
        k_cache_SKD, v_cache_SKD: one slot a token; the step's own keys and values are already in.

    Returns:
        [T, H, D].
    """
    out_THD = torch.empty_like(q_THD)
    decoding = [sequence for sequence in sequences if sequence.length == 1]
    if decoding:
        _attend_single(q_THD, k_cache_SKD, v_cache_SKD, decoding, out_THD)
    for sequence in sequences:
        if sequence.length > 1:
            _attend_chunk(q_THD, k_cache_SKD, v_cache_SKD, sequence, out_THD)
    return out_THD


def _attend_single(
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    sequences: Sequence[SequenceSlice],
    out_THD: torch.Tensor,
) -> None:
    """Sequences with one query each, as one batch padded to the longest context."""
    device = q_THD.device
    rows_B = torch.tensor([sequence.start for sequence in sequences], device=device)
    lengths_B = torch.tensor([sequence.context_length for sequence in sequences], device=device)
    slots_BL = torch.nn.utils.rnn.pad_sequence([sequence.slots for sequence in sequences], batch_first=True)
    mask_BL = torch.arange(slots_BL.shape[1], device=device) < lengths_B[:, None]
    attended = F.scaled_dot_product_attention(
        q_THD[rows_B][:, :, None],
        k_cache_SKD[slots_BL].transpose(1, 2),
        v_cache_SKD[slots_BL].transpose(1, 2),
        attn_mask=mask_BL[:, None, None],
        enable_gqa=True,
    )
    out_THD[rows_B] = attended[:, :, 0]


def _attend_chunk(
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    sequence: SequenceSlice,
    out_THD: torch.Tensor,
) -> None:
    """A prefill chunk: its queries see everything before them, earlier chunks included."""
    stop = sequence.start + sequence.length
    past = sequence.context_length - sequence.length
    mask = None
    if past:
        mask = torch.ones(sequence.length, sequence.context_length, dtype=torch.bool, device=q_THD.device).tril(past)
    attended = F.scaled_dot_product_attention(
        q_THD[sequence.start : stop].transpose(0, 1)[None],
        k_cache_SKD[sequence.slots].transpose(0, 1)[None],
        v_cache_SKD[sequence.slots].transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    out_THD[sequence.start : stop] = attended[0].transpose(0, 1)
