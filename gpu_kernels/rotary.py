"""Rotary embedding: the table of angles, and the kernels that apply it to queries and keys.

Nothing here reads anything on the host, so all of it can be captured.

Shapes: T tokens or patches with padding, A position axes, H query heads, K key/value heads, D head dim, E padded head
dim, F frequencies (D / 2), S slots.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch
from vitrine_vlm.gpu_kernels.fp8_weight import FP8

# In `apply_rope`.
_CHUNKS_A_PROGRAM = 1024
# In `rope_and_store_kv`: programs for each head, as few as fill a GPU, and tokens for each of them at most.
_PROGRAMS_A_HEAD, _MAX_TOKENS_A_PROGRAM = 32, 16


def rope_table(
    positions_AT: torch.Tensor, inverse_frequencies_F: torch.Tensor, axis_F: torch.Tensor, cos_sin_T2F: torch.Tensor
) -> None:
    """Computes the cosine and sine of every token's angles into `cos_sin_T2F`, once a step for all layers.

    Args:
        positions_AT: whole numbers, any strides: (row, column) of a patch, M-RoPE's (time, row, column) of a token.
        inverse_frequencies_F: float32.
        axis_F: the axis whose position each frequency multiplies, int32.
    """
    num_tokens, num_frequencies = positions_AT.shape[1], len(axis_F)
    _rope_table[(num_tokens,)](
        positions_AT, inverse_frequencies_F, axis_F, cos_sin_T2F, *positions_AT.stride(),
        NUM_FREQUENCIES=num_frequencies, BLOCK=triton.next_power_of_2(num_frequencies),
    )  # fmt: skip


@triton.jit
def _rope_table(
    positions, frequencies, axis, cos_sin, axis_stride, token_stride, NUM_FREQUENCIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < NUM_FREQUENCIES
    which = tl.load(axis + index, mask=inside, other=0)
    position = tl.load(positions + which * axis_stride + token * token_stride, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + index, mask=inside, other=0.0)
    at = cos_sin + token * 2 * NUM_FREQUENCIES + index
    tl.store(at, tl.cos(angle).to(cos_sin.dtype.element_ty), mask=inside)
    tl.store(at + NUM_FREQUENCIES, tl.sin(angle).to(cos_sin.dtype.element_ty), mask=inside)


def apply_rope(
    qkv_TX: torch.Tensor, cos_sin_T2F: torch.Tensor, num_heads: int, padded_head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotates queries and keys and pads each of their heads with zeros.

    Args:
        qkv_TX: [T, 3 * H * D], queries, keys and values side by side, with equally many heads.
        cos_sin_T2F: of `rope_table`.

    Returns:
        q, k: [T, H, E], new memory; v: [T, H, D], a view of `qkv_TX`.
    """
    num_tokens, width = qkv_TX.shape
    half = width // (3 * num_heads) // 2
    chunk = math.gcd(half, 4)
    q, k = qkv_TX.new_empty((2, num_tokens, num_heads, padded_head_dim)).unbind()
    num_chunks, pdl = num_tokens * num_heads * (half // chunk), has_dependent_launch(qkv_TX.device)
    _apply_rope[(triton.cdiv(num_chunks, _CHUNKS_A_PROGRAM), 2)](
        qkv_TX, cos_sin_T2F, q, q.numel(), num_chunks,
        HEADS=num_heads, HALF=half, PADDED=padded_head_dim, CHUNK=chunk, BLOCK=_CHUNKS_A_PROGRAM,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return q, k, qkv_TX.view(num_tokens, 3, num_heads, 2 * half)[:, 2]


@triton.jit(do_not_specialize=["num_chunks"])
def _apply_rope(
    qkv, cos_sin, out, out_stride, num_chunks,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # A lane handles CHUNK neighbours of the left half of a head and their partners of the right half.
    PER_HEAD: tl.constexpr = HALF // CHUNK
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    which = tl.program_id(1)
    token = (lane // (HEADS * PER_HEAD)).to(tl.int64)
    head = lane // PER_HEAD % HEADS
    index = lane % PER_HEAD * CHUNK + tl.arange(0, CHUNK)[None, :]
    stored = lane < num_chunks
    at = qkv + (token * 3 + which) * (HEADS * 2 * HALF) + head * (2 * HALF) + index
    left = tl.load(at, mask=stored, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=stored, other=0.0).to(tl.float32)
    left, right = _rotated(left, right, cos_sin + token * (2 * HALF) + index, HALF, stored)
    to = out + which * out_stride + (token * HEADS + head) * PADDED + index
    tl.store(to, left.to(qkv.dtype.element_ty), mask=stored)
    tl.store(to + HALF, right.to(qkv.dtype.element_ty), mask=stored)
    zeros = tl.zeros([BLOCK, CHUNK], qkv.dtype.element_ty)
    for pad in tl.static_range(2 * HALF, PADDED, HALF):
        tl.store(to + pad, zeros, mask=stored & (index + pad < PADDED))


@triton.jit
def _rotated(left, right, at_angle, HALF: tl.constexpr, mask):
    cos = tl.load(at_angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(at_angle + HALF, mask=mask, other=0.0).to(tl.float32)
    return left * cos - right * sin, right * cos + left * sin


def rope_and_store_kv(
    qkv_TX: torch.Tensor,
    cos_sin_T2F: torch.Tensor,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    eps: float,
    slot_mapping_T: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    q_THD: torch.Tensor,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Normalizes queries and keys head by head, rotates them, and stores keys and values in the cache.

    Args:
        qkv_TX: [T, (H + 2 K) * D], queries, keys and values side by side.
        cos_sin_T2F: of `rope_table`.
        q_weight_D, k_weight_D: gains of the norms; None for a decoder without them.
        slot_mapping_T: int64; nothing is stored for -1, which padding has.
        q_THD: filled with the queries.
        kv_scales: of keys and of values; a cache in FP8 (e4m3) gets them divided by these, and clamped to its range.
    """
    num_tokens = len(qkv_TX)
    num_kv_heads, head_dim = k_cache_SKD.shape[1:]
    num_heads = q_THD.shape[1]
    rows = min(_MAX_TOKENS_A_PROGRAM, triton.next_power_of_2(-(-num_tokens // _PROGRAMS_A_HEAD)))
    half = head_dim // 2
    normed, pdl = q_weight_D is not None, has_dependent_launch(qkv_TX.device)
    _rope_and_store_kv[(triton.cdiv(num_tokens, rows), num_heads + 2 * num_kv_heads)](
        qkv_TX, cos_sin_T2F, q_weight_D if normed else qkv_TX, k_weight_D if normed else qkv_TX, eps, slot_mapping_T,
        k_cache_SKD, v_cache_SKD, q_THD, num_tokens, *kv_scales,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=half, NORMED=normed, FP8_CACHE=k_cache_SKD.dtype == FP8, ROWS=rows,
        BLOCK=triton.next_power_of_2(half), PDL=pdl, num_warps=4 if rows > 4 else 1, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_and_store_kv(
    qkv, cos_sin, q_weight, k_weight, eps, slot_mapping, k_cache, v_cache, q_out, num_tokens,
    k_scale, v_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, FP8_CACHE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    real = token < num_tokens
    inside = real & (index < HALF)
    at = qkv + token * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + head * (2 * HALF) + index
    left, right = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    slot = tl.load(slot_mapping + token, mask=real, other=-1)
    kept = inside & (slot >= 0)
    # Pointers have a name for each tensor: a variable has one type in all branches, and a cache may be in FP8.
    if head >= HEADS + KV_HEADS:
        at_value = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + index
        tl.store(at_value, _cached(left, v_scale, v_cache.dtype.element_ty, FP8_CACHE), mask=kept)
        tl.store(at_value + HALF, _cached(right, v_scale, v_cache.dtype.element_ty, FP8_CACHE), mask=kept)
    else:
        first, second = left.to(tl.float32), right.to(tl.float32)
        if NORMED:
            weight = k_weight
            if head < HEADS:
                weight = q_weight
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            # Rounded before and after the gain, as the reference does.
            dtype = qkv.dtype.element_ty
            low = tl.load(weight + index, mask=index < HALF, other=0.0).to(tl.float32)
            high = tl.load(weight + HALF + index, mask=index < HALF, other=0.0).to(tl.float32)
            first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
            second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
        first, second = _rotated(first, second, cos_sin + token * (2 * HALF) + index, HALF, inside)
        rotated_first, rotated_second = first.to(qkv.dtype.element_ty), second.to(qkv.dtype.element_ty)
        if head < HEADS:
            at_query = q_out + (token * HEADS + head) * (2 * HALF) + index
            tl.store(at_query, rotated_first, mask=inside)
            tl.store(at_query + HALF, rotated_second, mask=inside)
        else:
            at_key = k_cache + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + index
            tl.store(at_key, _cached(rotated_first, k_scale, k_cache.dtype.element_ty, FP8_CACHE), mask=kept)
            tl.store(at_key + HALF, _cached(rotated_second, k_scale, k_cache.dtype.element_ty, FP8_CACHE), mask=kept)


@triton.jit
def _cached(value, scale, dtype: tl.constexpr, FP8_CACHE: tl.constexpr):
    """Returns keys or values as the cache holds them."""
    if FP8_CACHE:
        # What is no number stays so: an answer that comes of it has to end.
        value = tl.clamp(value.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return value.to(dtype)
