"""Causal attention over a paged KV cache, in plain torch.

Shapes: T tokens of the step, H query heads, K key/value heads, D head dim, B sequences, L longest context.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from vitrine_vlm.llm_worker.models.kv_slots import UNSCALED, KvScales, read_slots

_versions = itertools.count()


@dataclass(eq=False)
class BlockTable:
    """The cache blocks of one sequence, in order.

    version: a number that changes with the blocks, and that no other table ever has.
    """

    blocks: list[int] = field(default_factory=list)
    version: int = field(default_factory=lambda: next(_versions))
    _block_size: int = 1
    _slots: torch.Tensor | None = None

    @property
    def slots(self) -> torch.Tensor:
        """Cache slots of the blocks, one for each token, in order, int64, on the host."""
        if self._slots is None:
            # NumPy, as torch takes ten times as long for so few numbers.
            first_slots = np.array(self.blocks, dtype=np.int64)[:, None] * self._block_size
            self._slots = torch.from_numpy((first_slots + np.arange(self._block_size)).reshape(-1))
        return self._slots

    def set_slots(self, block_size: int) -> None:
        """Updates slots and version; must be called when `blocks` have changed."""
        self._block_size, self._slots = block_size, None  # made once they are read: a released table's never are
        self.version = next(_versions)


class SequenceSlice(NamedTuple):
    """The tokens of one sequence in a step.

    start, length: its tokens in the step. context_length: its tokens with KV after the step, these included.
    """

    start: int
    length: int
    context_length: int
    table: BlockTable

    @property
    def slots(self) -> torch.Tensor:
        """Cache slot of each token with KV, in order, [context_length] int64, on the host."""
        return self.table.slots[: self.context_length]


@dataclass(frozen=True)
class AttentionPlan:
    """The tables of a step that the attention of all layers reads.

    Sequences with one query run as one batch, padded to the longest context: single_tokens_B are their tokens in the
    step, single_slots_BL the slots of their contexts, single_mask_B11L is False at padding.
    chunks: the other sequences, each with the slots of its context, and with its mask where it has a past.
    """

    single_tokens_B: torch.Tensor
    single_slots_BL: torch.Tensor
    single_mask_B11L: torch.Tensor
    chunks: list[tuple[SequenceSlice, torch.Tensor, torch.Tensor | None]]


def plan_attention(sequences: Sequence[SequenceSlice], device: torch.device) -> AttentionPlan:
    """Makes the plan of a step.

    Args:
        sequences: cover all tokens of the step.
    """
    singles = [sequence for sequence in sequences if sequence.length == 1]
    longest = max((sequence.context_length for sequence in singles), default=0)
    lengths_B = torch.tensor([sequence.context_length for sequence in singles], dtype=torch.int64, device=device)
    mask_BL = torch.arange(longest, device=device) < lengths_B[:, None]
    slots_BL = torch.empty(0, 0, dtype=torch.int64, device=device)
    if singles:
        slots_BL = torch.nn.utils.rnn.pad_sequence([sequence.slots for sequence in singles], batch_first=True)
        slots_BL = slots_BL.to(device)
        # Masked slots have weight 0, and 0 * NaN is NaN: pad with a slot of the sequence itself.
        slots_BL = torch.where(mask_BL, slots_BL, slots_BL[:, :1])
    return AttentionPlan(
        torch.tensor([sequence.start for sequence in singles], dtype=torch.int64, device=device),
        slots_BL,
        mask_BL[:, None, None],
        [
            (sequence, sequence.slots.to(device), _chunk_mask(sequence, device))
            for sequence in sequences
            if sequence.length > 1
        ],
    )


def _chunk_mask(sequence: SequenceSlice, device: torch.device) -> torch.Tensor | None:
    past = sequence.context_length - sequence.length
    if not past:
        return None  # plainly causal
    return torch.ones(sequence.length, sequence.context_length, dtype=torch.bool, device=device).tril(past)


def paged_attention(
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    plan: AttentionPlan,
    kv_scales: KvScales = UNSCALED,
) -> torch.Tensor:
    """Computes causal attention of the step's queries within their own sequences, scaled by D ** -0.5.

    Args:
        k_cache_SKD, v_cache_SKD: one slot a token; the step's own keys and values are in them already.
        kv_scales: of a cache in FP8.

    Returns:
        [T, H, D].
    """
    out_THD = torch.empty_like(q_THD)

    def read(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = q_THD.dtype
        return read_slots(k_cache_SKD, slots, kv_scales.k, dtype), read_slots(v_cache_SKD, slots, kv_scales.v, dtype)

    if len(plan.single_tokens_B):
        _attend_single(q_THD, *read(plan.single_slots_BL), plan, out_THD)
    for sequence, slots, mask in plan.chunks:
        _attend_chunk(q_THD, *read(slots), sequence, mask, out_THD)
    return out_THD


def _attend_single(
    q_THD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    plan: AttentionPlan,
    out_THD: torch.Tensor,
) -> None:
    """Attends with one query a sequence: query heads that share keys and values are the queries of one attention."""
    num_kv_heads = k_BLKD.shape[2]
    attended = F.scaled_dot_product_attention(
        q_THD[plan.single_tokens_B].unflatten(1, (num_kv_heads, -1)),
        k_BLKD.transpose(1, 2),
        v_BLKD.transpose(1, 2),
        attn_mask=plan.single_mask_B11L,
    )
    out_THD[plan.single_tokens_B] = attended.flatten(1, 2)


def _attend_chunk(
    q_THD: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    sequence: SequenceSlice,
    mask: torch.Tensor | None,
    out_THD: torch.Tensor,
) -> None:
    """Attends with a prefill chunk, whose queries attend to everything before them, earlier chunks included."""
    stop = sequence.start + sequence.length
    attended = F.scaled_dot_product_attention(
        q_THD[sequence.start : stop].transpose(0, 1)[None],
        k_LKD.transpose(0, 1)[None],
        v_LKD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    out_THD[sequence.start : stop] = attended[0].transpose(0, 1)
