"""Every kernel against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter (tests/__init__.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.decoder import RMSNorm
from vitrine_vlm.llm_worker.models.kv_slots import UNSCALED, KvScales, write_slots
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice, paged_attention, plan_attention
from vitrine_vlm.llm_worker.models.rotary import axis_of_frequency, rotary_at
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
from vitrine_vlm.gpu_kernels import skinny_gemm  # noqa: E402
from vitrine_vlm.gpu_kernels.norms import add_rms_norm  # noqa: E402
from vitrine_vlm.gpu_kernels.rotary import rope_and_store_kv, rope_table  # noqa: E402
from vitrine_vlm.llm_worker.gpu.step_tables import StepTables, Tiles  # noqa: E402
from vitrine_vlm.llm_worker.gpu.tile_attention import tile_attention  # noqa: E402

HEADS, KV_HEADS, BLOCK_SIZE = 6, 2, 4
FP8 = torch.float8_e4m3fn


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("num_added", [0, 1, 2])
def test_norm_adds_first(num_added: int) -> None:
    x, weight = random(5, 72), random(72)
    added = tuple(random(5, 72) * (1 + each) for each in range(num_added))
    expected_x = x + sum(added, torch.zeros_like(x))
    norm = RMSNorm(72, 1e-6).to(DEVICE)
    norm.weight.data.copy_(weight)
    out = add_rms_norm(x, added, weight, 1e-6)
    torch.testing.assert_close(x, expected_x)
    torch.testing.assert_close(out, norm(expected_x).detach())


@pytest.mark.parametrize("num_tokens", [3, 600])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_queries_and_keys_are_normed_rotated_and_cached(
    request: pytest.FixtureRequest, family: str, num_tokens: int
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    config = text_config(open_checkpoint(str(folder)))
    head_dim = config.head_dim
    positions = torch.randint(0, 500, (3, num_tokens + 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=DEVICE) / head_dim
    axis = axis_of_frequency(config).int().to(DEVICE)
    cos_sin = torch.empty(num_tokens, 2, head_dim // 2, device=DEVICE)
    rope_table(positions[:, :num_tokens], 1.0 / config.rope_theta**exponents, axis, cos_sin)

    qkv = random(num_tokens, (HEADS + 2 * KV_HEADS) * head_dim)
    slots = torch.randperm(2 * num_tokens, generator=torch.Generator().manual_seed(1))[:num_tokens].to(DEVICE)
    slots[1] = -1
    k_cache, v_cache = torch.zeros(2, 2 * num_tokens, KV_HEADS, head_dim, device=DEVICE).unbind()
    q_weight, k_weight = (random(head_dim), random(1 + head_dim)[1:].contiguous()) if config.qk_norm else (None, None)
    q = torch.empty(num_tokens, HEADS, head_dim, device=DEVICE)
    rope_and_store_kv(qkv, cos_sin, q_weight, k_weight, 1e-6, slots, k_cache, v_cache, q)

    plain_q, plain_k, plain_v = qkv.unflatten(1, (-1, head_dim)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if q_weight is not None and k_weight is not None:
        plain_q = F.rms_norm(plain_q, (head_dim,), q_weight, 1e-6)
        plain_k = F.rms_norm(plain_k, (head_dim,), k_weight, 1e-6)
    rotary = rotary_at(positions[:, :num_tokens], config, torch.float32)
    torch.testing.assert_close(q, rotary.apply_rope(plain_q), atol=1e-5, rtol=1e-5)
    written = slots >= 0
    torch.testing.assert_close(k_cache[slots[written]], rotary.apply_rope(plain_k)[written], atol=1e-5, rtol=1e-5)
    assert torch.equal(v_cache[slots[written]], plain_v[written])
    untouched = torch.ones(2 * num_tokens, dtype=torch.bool, device=DEVICE)
    untouched[slots[written]] = False
    assert not k_cache[untouched].any() and not v_cache[untouched].any()


def test_keys_and_values_are_cached_in_fp8() -> None:
    """As plain torch would store them, from what the kernel stores in a plain cache."""
    num_tokens, head_dim, scales = 8, 24, KvScales(0.25, 4.0)
    qkv = random(num_tokens, (HEADS + 2 * KV_HEADS) * head_dim) * 10
    qkv[3:5] *= 1000  # out of range
    cos_sin, slots = random(num_tokens, 2, head_dim // 2), torch.arange(num_tokens, device=DEVICE).flip(0)
    slots[1] = -1
    caches = {dtype: torch.zeros(2, 10, KV_HEADS, head_dim, device=DEVICE).to(dtype) for dtype in (torch.float32, FP8)}
    for cache in caches.values():
        k_cache, v_cache = cache.unbind()
        q = torch.empty(num_tokens, HEADS, head_dim, device=DEVICE)
        rope_and_store_kv(qkv, cos_sin, None, None, 0.0, slots, k_cache, v_cache, q, scales)
    in_fp8 = torch.zeros(2, 10, KV_HEADS, head_dim, device=DEVICE).to(FP8)
    for cache, plain, scale in zip(in_fp8, caches[torch.float32], scales, strict=True):
        write_slots(cache, torch.arange(10, device=DEVICE), plain, scale)
    found, expected = caches[FP8].float(), in_fp8.float()
    assert found.abs().max() == 448
    compared = torch.ones_like(found, dtype=torch.bool)
    if DEVICE.type == "cpu":
        # Triton's interpreter halves values that should round up to a power of two, and cuts off subnormal ones.
        compared = (torch.frexp(expected).mantissa.abs() != 0.5) & ((expected == 0) | (expected.abs() >= 2**-6))
        assert compared.float().mean() > 0.9
    assert torch.equal(found[compared], expected[compared])


@pytest.mark.gpu
def test_what_is_no_number_stays_so_in_fp8() -> None:
    """On a GPU, as Triton's interpreter has no NaN in FP8."""
    num_tokens, head_dim = 3, 24
    qkv, slots = random(num_tokens, (HEADS + 2 * KV_HEADS) * head_dim), torch.arange(num_tokens, device=DEVICE)
    qkv[1] = torch.nan
    k_cache, v_cache = torch.zeros(2, num_tokens, KV_HEADS, head_dim, device=DEVICE).to(FP8).unbind()
    q, cos_sin = torch.empty(num_tokens, HEADS, head_dim, device=DEVICE), random(num_tokens, 2, head_dim // 2)
    rope_and_store_kv(qkv, cos_sin, None, None, 0.0, slots, k_cache, v_cache, q, KvScales(0.25, 4.0))
    for cache in (k_cache, v_cache):
        assert cache.float().isnan().all(dim=(1, 2)).tolist() == [False, True, False]
        assert not cache.float()[[0, 2]].isnan().any()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The tolerance allows for sums of a thousand numbers in another order."""
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_skinny_gemms(num_rows: int) -> None:
    x, weight, bias, to = random(num_rows, 1100), random(22, 1100), random(22), random(num_rows, 22)
    assert_close(skinny_gemm.skinny_linear(x, weight, bias), F.linear(x, weight, bias))
    assert_close(skinny_gemm.skinny_linear(x, weight), F.linear(x, weight))
    expected = F.silu(F.linear(x, weight[:11])) * F.linear(x, weight[11:])
    assert_close(skinny_gemm.skinny_gated_silu(x, weight), expected)
    expected = to + F.linear(x, weight)
    skinny_gemm.skinny_linear_add(x, weight, to)
    assert_close(to, expected)


# Tokens of each sequence in the step, and how many there are with KV afterwards.
DECODING = [(1, 1), (1, 7), (1, 400), (1, 64)]
MIXED = [(1, 130), (5, 5), (37, 400), (1, 1), (3, 70)]


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("lengths", [DECODING, MIXED], ids=["decoding", "mixed"])
def test_tiles_attend_over_scattered_blocks(lengths: list[tuple[int, int]], head_dim: int, num_splits: int) -> None:
    check_tiles(lengths, head_dim, num_splits)


@pytest.mark.parametrize(("lengths", "num_splits"), [(DECODING, 3), (MIXED, 1)], ids=["decoding", "mixed"])
def test_tiles_attend_over_a_cache_in_fp8(lengths: list[tuple[int, int]], num_splits: int) -> None:
    check_tiles(lengths, 24, num_splits, FP8, KvScales(0.3, 2.5))


def check_tiles(
    lengths: list[tuple[int, int]],
    head_dim: int,
    num_splits: int,
    kv_dtype: torch.dtype = torch.float32,
    scales: KvScales = UNSCALED,
) -> None:
    num_blocks = 300
    k_cache, v_cache = random(2, num_blocks * BLOCK_SIZE, KV_HEADS, head_dim).unbind()
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).tolist()
    slices, num_tokens = [], 0
    for length, context_length in lengths:
        table = BlockTable([free.pop() for _ in range(-(-context_length // BLOCK_SIZE))])
        table.set_slots(BLOCK_SIZE)
        slices.append(SequenceSlice(num_tokens, length, context_length, table))
        num_tokens += length
    # The content of unused slots must not matter.
    k_cache[torch.tensor(free)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)] = float("nan")
    k_cache, v_cache = k_cache.to(kv_dtype), v_cache.to(kv_dtype)
    q = random(num_tokens + 3, HEADS, head_dim)
    num_tiles = 30
    singles, chunks = Tiles(1, num_tiles, KV_HEADS, DEVICE), Tiles(4, num_tiles, KV_HEADS, DEVICE)
    tables = StepTables(singles, chunks, 8, 100, BLOCK_SIZE, DEVICE)
    tables.write(slices[1:], num_splits, num_splits)
    tables.write(slices, num_splits, num_splits)
    assert max(singles.counts[1], chunks.counts[1]) == min(num_splits, 3)
    out = torch.full_like(q, 7.0)
    for tiles in (singles, chunks):
        tile_attention(q, k_cache, v_cache, tables, tiles, num_tiles, num_splits, out, scales)
    expected = paged_attention(q[:num_tokens], k_cache, v_cache, plan_attention(slices, DEVICE), scales)
    torch.testing.assert_close(out[:num_tokens], expected, atol=1e-5, rtol=1e-4)
    assert (out[num_tokens:] == 7.0).all()  # no sequence's
