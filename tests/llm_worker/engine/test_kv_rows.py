"""KV rows: KV that is read from one cache and landed in another is the same, on any device."""

from __future__ import annotations

import pytest
import torch

from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.llm_worker.engine import kv_rows
from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv, compile_copies, land_kv

LAYERS, SLOTS, HEADS, HEAD_DIM = 3, 64, 2, 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn]
# Out of order, and across the parts in which they are copied.
FROM_SLOTS = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0))[:21]
TO_SLOTS = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))[:21]


def cache(device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, SLOTS, HEADS, HEAD_DIM, generator=generator).to(dtype).to(device)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """On the host; not all of torch's operations know FP8."""
    return x.contiguous().view(torch.uint8).cpu()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_rows, "_TOKENS_AT_ONCE", 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_the_tokens_in_order(device: str, dtype: torch.dtype) -> None:
    layers = cache(device, 0, dtype)
    kv = CachedKv(layers, FROM_SLOTS)
    expected = torch.stack([as_bytes(layers[:, :, slot]).flatten() for slot in FROM_SLOTS.tolist()])
    assert (kv.dtype, kv.nbytes) == (dtype, expected.nbytes)
    assert kv.shape == (len(expected), expected.shape[1] // dtype.itemsize)
    assert torch.equal(as_bytes(kv.on_host()), expected)
    target = torch.zeros(kv.shape, dtype=kv.dtype, device=device)
    kv.copy_to(target)
    assert torch.equal(as_bytes(target), expected)
    in_host_memory = torch.zeros(kv.shape, dtype=kv.dtype)
    kv.copy_to(in_host_memory)
    assert torch.equal(as_bytes(in_host_memory), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_lands_is_what_was_sent_and_touches_nothing_else(device: str, dtype: torch.dtype) -> None:
    source, target = cache(device, 0, dtype), cache(device, 1, dtype)
    before = as_bytes(target.clone())
    first_row = 5
    rows = TensorRows(CachedKv(source, FROM_SLOTS).on_host())
    land_kv(rows, first_row, target, TO_SLOTS[first_row:])
    found, sent = as_bytes(target), as_bytes(source)
    assert torch.equal(found[:, :, TO_SLOTS[first_row:]], sent[:, :, FROM_SLOTS[first_row:]])
    others = [slot for slot in range(SLOTS) if slot not in TO_SLOTS[first_row:].tolist()]
    assert torch.equal(found[:, :, others], before[:, :, others])


@pytest.mark.gpu
def test_compiling_the_copies_leaves_the_cache_as_it_is() -> None:
    layers = cache("cuda", 0)
    before = as_bytes(layers)
    compile_copies(layers)
    assert torch.equal(as_bytes(layers), before)
