"""The activation between the linear layers of a gated MLP.

Shapes: P rows, I inner size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [P, 2 * I] that hold gate and up side by side; [P, I], new memory."""
    num_rows, width = gate_up.shape
    out = gate_up.new_empty((num_rows, width // 2))
    _gated_silu[(num_rows, triton.cdiv(width // 2, _BLOCK))](gate_up, out, width // 2, BLOCK=_BLOCK)
    return out


@triton.jit
def _gated_silu(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < width
    gate = tl.load(gate_up + row * 2 * width + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + index, mask=inside, other=0.0).to(tl.float32)
    # Rounded in between, as the reference does.
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + index, (active * up).to(out.dtype.element_ty), mask=inside)
