"""Lands rows on a GPU: one Triton kernel copies them from the encoder's pool into the main and deepstack buffers.

Shapes: T tokens, C hidden size, N deepstack layers, W row width (C * (1 + N)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COPIED_A_PROGRAM = 4096


def land_rows(rows_TW: torch.Tensor, main_TC: torch.Tensor, deepstack_NTC: torch.Tensor | None) -> None:
    """Copies the main and deepstack parts of rows in one launch on the current GPU.

    Args:
        rows_TW: contiguous rows on the same GPU, or mapped for it (`CudaIpcMapping`).
        main_TC, deepstack_NTC: the destinations, with any stride between rows and layers; None without deepstack.
    """
    num_tokens, hidden = main_TC.shape
    width = hidden if deepstack_NTC is None else hidden * (1 + len(deepstack_NTC))
    deepstack = main_TC if deepstack_NTC is None else deepstack_NTC
    grid = (num_tokens, triton.cdiv(width, _COPIED_A_PROGRAM))
    _land_rows[grid](
        rows_TW, main_TC, deepstack, rows_TW.stride(0), main_TC.stride(0), deepstack.stride(-2),
        0 if deepstack_NTC is None else deepstack_NTC.stride(0),
        HIDDEN=hidden, WIDTH=width, BLOCK=min(_COPIED_A_PROGRAM, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip


@triton.jit
def _land_rows(
    rows, main, deepstack, row_stride, main_stride, deepstack_stride, layer_stride,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(rows + token * row_stride + column, mask=inside)
    tl.store(main + token * main_stride + column, value, mask=column < HIDDEN)
    layer, within = column // HIDDEN - 1, column % HIDDEN
    to = deepstack + layer.to(tl.int64) * layer_stride + token * deepstack_stride + within
    tl.store(to, value, mask=inside & (column >= HIDDEN))
