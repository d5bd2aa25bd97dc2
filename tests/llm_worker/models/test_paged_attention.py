"""Attention over scattered slots equals plain attention, and reads no slots of other sequences."""

from __future__ import annotations

import pytest
import torch

from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice, paged_attention, plan_attention

NUM_SLOTS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 128, 6, 2, 16

# (query tokens, context length) of each sequence of the step.
STEPS = {
    "decoding": [(1, 9), (1, 1), (1, 30), (1, 17)],
    "prefill": [(12, 12), (5, 5)],
    "chunks with a past": [(12, 30), (5, 6)],
    "everything": [(1, 9), (12, 30), (1, 21), (5, 5), (1, 1)],
}


def plainly(q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor) -> torch.Tensor:
    """Plain softmax attention; the queries are the last tokens of the context."""
    num_queries, length = len(q_THD), len(k_LKD)
    k_LHD, v_LHD = (each.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for each in (k_LKD, v_LKD))
    scores_HTL = torch.einsum("thd,lhd->htl", q_THD, k_LHD) * HEAD_DIM**-0.5
    seen_TL = torch.arange(length) <= torch.arange(length - num_queries, length)[:, None]
    return torch.einsum("htl,lhd->thd", scores_HTL.masked_fill(~seen_TL, -torch.inf).softmax(-1), v_LHD)


@pytest.mark.parametrize("name", list(STEPS))
def test_equals_plain_attention_whatever_lies_in_other_slots(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # No sequence has slot 0: a batch must not be padded with what is left there.
    free = (torch.randperm(NUM_SLOTS - 1, generator=generator) + 1).tolist()
    k_cache_SKD, v_cache_SKD = torch.full((2, NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM), torch.nan)
    sequences, expected, queries, start = [], [], [], 0
    for length, context_length in STEPS[name]:
        slots = torch.tensor([free.pop() for _ in range(context_length)])
        q_THD = torch.randn(length, NUM_HEADS, HEAD_DIM, generator=generator)
        k_LKD, v_LKD = torch.randn(2, context_length, NUM_KV_HEADS, HEAD_DIM, generator=generator)
        k_cache_SKD[slots], v_cache_SKD[slots] = k_LKD, v_LKD
        sequences.append(SequenceSlice(start, length, context_length, BlockTable(slots.tolist())))
        queries.append(q_THD)
        expected.append(plainly(q_THD, k_LKD, v_LKD))
        start += length
    plan = plan_attention(sequences, torch.device("cpu"))
    out_THD = paged_attention(torch.cat(queries), k_cache_SKD, v_cache_SKD, plan)
    assert torch.allclose(out_THD, torch.cat(expected), atol=1e-5)
