"""Keys and values in the slots of the cache: how they are written, and read back for attention.

A cache in FP8 (e4m3) holds each value divided by a scale, one for a layer's keys and one for its values. Scales are
static: those with which a checkpoint was calibrated, or 1. A cache in any other dtype holds values as they are.

Shapes: S slots, N slots that are written, K key/value heads, D head dim.

Source: vLLM's `model_executor/layers/quantization/kv_cache.py` (stored = value / scale, value = stored * scale, 1 where
the checkpoint has none); compressed-tensors' `KVCacheScaleType` for the names of scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitrine_vlm.gpu_kernels.fp8_weight import FP8, FP8_MAX


class KvScales(NamedTuple):
    """The scales of one layer's keys and values in FP8."""

    k: float = 1.0
    v: float = 1.0


UNSCALED = KvScales()


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in FP8 as a view of its bytes, and any other as it is: torch indexes FP8 only in part."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def write_slots(cache_SKD: torch.Tensor, slots_N: torch.Tensor, x_NKD: torch.Tensor, scale: float) -> None:
    """Stores keys or values.

    Args:
        scale: of these keys or values, where the cache is in FP8.
    """
    if cache_SKD.dtype == FP8:
        # Clamped, as torch converts what exceeds e4m3's range to NaN.
        x_NKD = (x_NKD.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    as_bytes(cache_SKD)[slots_N] = as_bytes(x_NKD)


def read_slots(cache_SKD: torch.Tensor, slots: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns keys or values, [..., K, D], new memory.

    Args:
        slots: [...]. scale: as for `write_slots`.
        dtype: of the result, where the cache is in FP8; otherwise it is the cache's.
    """
    # Several times as fast on the CPU as indexing with a tensor.
    stored = as_bytes(cache_SKD).index_select(0, slots.flatten()).unflatten(0, slots.shape)
    if cache_SKD.dtype != FP8:
        return stored
    x = stored.view(FP8).to(dtype)
    return x if scale == 1.0 else x.mul_(scale)
