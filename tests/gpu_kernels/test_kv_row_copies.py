"""Copies between KV slots and rows, against indexing; without a GPU in Triton's interpreter (tests/__init__.py)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from vitrine_vlm.gpu_kernels.kv_row_copies import gather_rows, scatter_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, SLOTS, HEADS, HEAD_DIM = 3, 40, 2, 24
DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn]


def cache(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, SLOTS, HEADS, HEAD_DIM, generator=generator).to(dtype).to(DEVICE)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_slots_in_order(dtype: torch.dtype) -> None:
    """Rows whose width is no power of two."""
    layers, slots = cache(0, dtype), torch.tensor([7, 0, 39, 8])
    rows = torch.zeros(6, LAYERS * 2 * HEADS * HEAD_DIM, device=DEVICE).to(dtype)
    gather_rows(layers, slots.to(DEVICE), rows[1:5])
    expected = torch.stack([as_bytes(layers[:, :, slot]).flatten() for slot in slots.tolist()])
    assert torch.equal(as_bytes(rows[1:5]), expected)
    assert not as_bytes(rows[0]).any() and not as_bytes(rows[5]).any()

    target = cache(1, dtype)
    before, to_slots = as_bytes(target), torch.tensor([3, 39, 1, 0])
    scatter_rows(rows[1:5], to_slots.to(DEVICE), target)
    found, others = as_bytes(target), [slot for slot in range(SLOTS) if slot not in to_slots.tolist()]
    assert torch.equal(found[:, :, to_slots], as_bytes(layers)[:, :, slots])
    assert torch.equal(found[:, :, others], before[:, :, others])


def test_rows_of_several_programs() -> None:
    layers, slots = torch.randn(5, 2, 3, 8, 128).to(DEVICE), torch.tensor([2, 0], device=DEVICE)
    rows = torch.zeros(2, 5 * 2 * 8 * 128, device=DEVICE)
    gather_rows(layers, slots, rows)
    assert torch.equal(rows, layers[:, :, slots].permute(2, 0, 1, 3, 4).flatten(1))
    target = torch.zeros_like(layers)
    scatter_rows(rows, slots, target)
    assert torch.equal(target[:, :, slots], layers[:, :, slots])
    assert not target[:, :, 1].any()
