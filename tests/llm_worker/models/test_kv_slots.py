"""Slots of a cache in FP8 hold values to within e4m3's rounding, and attention reads what they hold."""

from __future__ import annotations

import pytest
import torch

from vitrine_vlm.llm_worker.models.kv_slots import KvScales, read_slots, write_slots
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice, paged_attention, plan_attention

NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM = 32, 2, 8
FP8 = torch.float8_e4m3fn
# Of e4m3: half of the step behind the point of a number with three bits there; the largest, and the smallest step.
ROUNDING, LARGEST, SMALLEST = 1 / 16, 448.0, 2**-9


def written(x_NKD: torch.Tensor, slots_N: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    cache_SKD = torch.full((NUM_SLOTS, NUM_KV_HEADS, HEAD_DIM), torch.nan).to(dtype)
    write_slots(cache_SKD, slots_N, x_NKD, scale)
    return cache_SKD


def randn(num_tokens: int, num_heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_values_are_rounded_to_e4m3(scale: float, dtype: torch.dtype) -> None:
    slots_N = torch.tensor([5, 31, 0, 7])
    x_NKD = (randn(4, NUM_KV_HEADS, 0) * 10).to(dtype)
    cache_SKD = written(x_NKD, slots_N, scale, FP8)
    assert cache_SKD.dtype == FP8
    found_NKD = read_slots(cache_SKD, slots_N, scale, dtype)
    assert found_NKD.dtype == dtype
    error = (found_NKD.float() - x_NKD.float()).abs()
    # One more rounding in bfloat16, of the value times the scale.
    assert (error <= (ROUNDING * 1.1 * x_NKD.float().abs()).clamp_min(SMALLEST * scale)).all()
    assert error.max() > 0
    others = [slot for slot in range(NUM_SLOTS) if slot not in slots_N.tolist()]
    assert read_slots(cache_SKD, torch.tensor(others), scale, dtype).isnan().all()


def test_what_exceeds_the_range_is_clamped() -> None:
    slots_N, x_NKD = torch.tensor([3]), torch.full((1, NUM_KV_HEADS, HEAD_DIM), 1e4)
    x_NKD[:, 0] *= -1
    found_NKD = read_slots(written(x_NKD, slots_N, 2.0, FP8), slots_N, 2.0, torch.float32)
    assert torch.equal(found_NKD, x_NKD.sign() * 2 * LARGEST)


def test_other_caches_hold_values_as_they_are() -> None:
    slots_N, x_NKD = torch.tensor([3, 4]), randn(2, NUM_KV_HEADS, 1)
    cache_SKD = written(x_NKD, slots_N, 7.0, torch.float32)
    assert torch.equal(read_slots(cache_SKD, slots_N, 7.0, torch.bfloat16), x_NKD)


def test_attention_reads_keys_and_values_times_their_scales() -> None:
    scales = KvScales(k=0.5, v=3.0)
    sequences, start = [], 0
    for length, context_length, first_slot in ((1, 9, 0), (4, 11, 9), (1, 3, 20)):
        slots = range(first_slot, first_slot + context_length)
        sequences.append(SequenceSlice(start, length, context_length, BlockTable([*slots])))
        start += length
    q_THD = randn(start, 2 * NUM_KV_HEADS, 2)
    every_slot = torch.arange(NUM_SLOTS)
    fp8 = [written(randn(NUM_SLOTS, NUM_KV_HEADS, 3 + i), every_slot, scales[i], FP8) for i in range(2)]
    plain = [read_slots(fp8[i], every_slot, scales[i], torch.float32) for i in range(2)]
    plan = plan_attention(sequences, torch.device("cpu"))
    found_THD = paged_attention(q_THD, fp8[0], fp8[1], plan, scales)
    torch.testing.assert_close(found_THD, paged_attention(q_THD, plain[0], plain[1], plan))
