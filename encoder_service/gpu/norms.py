"""The norms of a tower's residual stream, which also add its deferred product and the biases that it lacks.

Attention leaves rows of padding unwritten, but loads whole tiles, where a NaN in a masked row would spoil the sum.
Each norm therefore sets rows of padding to zero.

Shapes: S attention segments, C hidden size, n patches a row.
"""

from __future__ import annotations

import torch

from vitrine_vlm.encoder_service.gpu.residual import ResidualStream
from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.norms import add_shifted_norm

EPS = 1e-6  # in every norm of all families


def layer_norm(
    stream: ResidualStream,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    fp8: bool = False,
) -> Rows:
    """Layer norm of `stream + shift`, new memory.

    Args:
        stream: its deferred product is added to it.
        shift_C: [C] float32, the biases that the stream still lacks.
        weight, bias: [n * C]; n patches are normalized as one row.
        cu_seqlens: [S + 1] int32; its last entry is the number of patches.

    Returns:
        [P / n, n * C]
    """
    return add_shifted_norm(stream.x_PC, stream.pop_deferred(), shift_C, weight, bias, cu_seqlens, EPS, fp8=fp8)


def rms_norm(
    stream: ResidualStream,
    shift_C: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    fp8: bool = False,
) -> Rows:
    """RMS norm of `stream + shift`; otherwise as `layer_norm`."""
    return add_shifted_norm(stream.x_PC, stream.pop_deferred(), shift_C, weight, None, cu_seqlens, EPS, fp8=fp8)
