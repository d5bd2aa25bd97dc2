"""Copies between the slots of a KV cache and rows, one a token, in one launch: one that waits its turn on a busy GPU.

Shapes: L layers, S slots, K key/value heads, D head dim, T tokens, W = L * 2 * K * D elements of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Words of four bytes.
_COPIED_A_PROGRAM = 4096


def gather_rows(layers_L2SKD: torch.Tensor, slots_T: torch.Tensor, rows_TW: torch.Tensor) -> None:
    """Copies the slots' keys and values into rows, on the current stream.

    Args:
        layers_L2SKD: the cache, contiguous, of any dtype.
        slots_T: cache slots of the tokens, int64 on the same GPU.
        rows_TW: the destination, in the cache's dtype, contiguous.
    """
    _launch(layers_L2SKD, slots_T, rows_TW, into_rows=True)


def scatter_rows(rows_TW: torch.Tensor, slots_T: torch.Tensor, layers_L2SKD: torch.Tensor) -> None:
    """Copies rows into the slots; the arguments are those of `gather_rows`."""
    _launch(layers_L2SKD, slots_T, rows_TW, into_rows=False)


def _launch(layers_L2SKD: torch.Tensor, slots_T: torch.Tensor, rows_TW: torch.Tensor, into_rows: bool) -> None:
    layers, rows = layers_L2SKD.flatten(0, 1).flatten(2).view(torch.int32), rows_TW.view(torch.int32)
    num_tokens, width = rows.shape
    grid = (num_tokens, triton.cdiv(width, _COPIED_A_PROGRAM))
    _copy_slots[grid](
        layers, slots_T, rows, layers.stride(0), rows.stride(0),
        SLOT=layers.shape[-1], WIDTH=width, BLOCK=min(_COPIED_A_PROGRAM, triton.next_power_of_2(width)),
        INTO_ROWS=into_rows, num_warps=8,
    )  # fmt: skip


@triton.jit
def _copy_slots(
    layers, slots, rows, layer_stride, row_stride,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTO_ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    in_cache = layers + (column // SLOT).to(tl.int64) * layer_stride + slot * SLOT + column % SLOT
    in_rows = rows + token * row_stride + column
    if INTO_ROWS:
        tl.store(in_rows, tl.load(in_cache, mask=inside), mask=inside)
    else:
        tl.store(in_cache, tl.load(in_rows, mask=inside), mask=inside)
