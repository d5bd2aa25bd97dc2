"""Triton kernels for what lies between two matrix products of the decoder.

Nothing here reads anything on the host, so all of it can be captured. Tokens behind those of the step pad it up to the
size a graph was captured at; their slot is -1, and what they compute is used by nobody.

Shapes: T tokens with padding, C hidden size, H query heads, K key/value heads, D head dim, F frequencies (D / 2),
S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_kernels.early_start import starts_early

# As few programs as fill a GPU, a head; with so many tokens each at most.
_PROGRAMS_A_HEAD, _MAX_TOKENS_A_PROGRAM = 32, 16


def add_rms_norm(
    x_TC: torch.Tensor,
    added: tuple[torch.Tensor, ...],
    weight_C: torch.Tensor,
    eps: float,
    out_TC: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm of `x`, in new memory or `out_TC`, after up to two other tensors of its shape were added to `x`."""
    out_TC = torch.empty_like(x_TC) if out_TC is None else out_TC
    num_tokens, width = x_TC.shape
    first, second = (*added, x_TC, x_TC)[:2]
    block, early = triton.next_power_of_2(width), starts_early(x_TC.device)
    _add_rms_norm[(num_tokens,)](
        x_TC, first, second, weight_C, out_TC, eps,
        WIDTH=width, NUM_ADDED=len(added), BLOCK=block, EARLY=early, num_warps=min(8, max(1, block // 512)),
        launch_pdl=early,
    )  # fmt: skip
    return out_TC


@triton.jit
def _add_rms_norm(
    x, first, second, weight, out, eps, WIDTH: tl.constexpr, NUM_ADDED: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < WIDTH
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NUM_ADDED > 0:
        value = _rounded_sum(value, tl.load(first + at, mask=inside, other=0.0))
    if NUM_ADDED > 1:
        value = _rounded_sum(value, tl.load(second + at, mask=inside, other=0.0))
    if NUM_ADDED > 0:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    # Rounded before the gain, as the reference does.
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rounded_sum(value, added):
    # As the reference does.
    return (value + added.to(tl.float32)).to(added.dtype).to(tl.float32)


def rope_table(
    positions_3T: torch.Tensor, inverse_frequencies_F: torch.Tensor, axis_F: torch.Tensor, cos_sin_T2F: torch.Tensor
) -> None:
    """Cosine and sine of every token's angles, into `cos_sin_T2F`; once a step, for all layers.

    Args:
        positions_3T: M-RoPE positions (time, row, column), int64, any stride between axes.
        axis_F: which of the three each frequency turns with, int32.
    """
    num_tokens, num_frequencies = positions_3T.shape[1], len(axis_F)
    _rope_table[(num_tokens,)](
        positions_3T, inverse_frequencies_F, axis_F, cos_sin_T2F, positions_3T.stride(0),
        NUM_FREQUENCIES=num_frequencies, BLOCK=triton.next_power_of_2(num_frequencies),
    )  # fmt: skip


@triton.jit
def _rope_table(positions, frequencies, axis, cos_sin, stride, NUM_FREQUENCIES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < NUM_FREQUENCIES
    which = tl.load(axis + index, mask=inside, other=0)
    position = tl.load(positions + which * stride + token, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + index, mask=inside, other=0.0)
    at = cos_sin + token * 2 * NUM_FREQUENCIES + index
    tl.store(at, tl.cos(angle).to(cos_sin.dtype.element_ty), mask=inside)
    tl.store(at + NUM_FREQUENCIES, tl.sin(angle).to(cos_sin.dtype.element_ty), mask=inside)


def turn_and_write(
    qkv_TX: torch.Tensor,
    cos_sin_T2F: torch.Tensor,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    eps: float,
    slot_mapping_T: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    q_THD: torch.Tensor,
) -> None:
    """Norms queries and keys head by head, turns them, and writes keys and values to the cache.

    Args:
        qkv_TX: [T, (H + 2 K) * D], queries, keys and values side by side.
        cos_sin_T2F: of `rope_table`.
        q_weight_D, k_weight_D: gains of the norms; None for a decoder without them.
        slot_mapping_T: int64; -1 writes nothing.
        q_THD: filled with the queries.
    """
    num_tokens = len(qkv_TX)
    num_kv_heads, head_dim = k_cache_SKD.shape[1:]
    num_heads = q_THD.shape[1]
    rows = min(_MAX_TOKENS_A_PROGRAM, triton.next_power_of_2(-(-num_tokens // _PROGRAMS_A_HEAD)))
    half = head_dim // 2
    normed, early = q_weight_D is not None, starts_early(qkv_TX.device)
    _turn_and_write[(triton.cdiv(num_tokens, rows), num_heads + 2 * num_kv_heads)](
        qkv_TX, cos_sin_T2F, q_weight_D if normed else qkv_TX, k_weight_D if normed else qkv_TX, eps, slot_mapping_T,
        k_cache_SKD, v_cache_SKD, q_THD, num_tokens,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=half, NORMED=normed, ROWS=rows,
        BLOCK=triton.next_power_of_2(half), EARLY=early, num_warps=4 if rows > 4 else 1, launch_pdl=early,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _turn_and_write(
    qkv, cos_sin, q_weight, k_weight, eps, slot_mapping, k_cache, v_cache, q_out, num_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
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
    if head >= HEADS + KV_HEADS:
        to = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + index
        tl.store(to, left, mask=kept)
        tl.store(to + HALF, right, mask=kept)
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
        at_angle = cos_sin + token * (2 * HALF) + index
        cos = tl.load(at_angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(at_angle + HALF, mask=inside, other=0.0).to(tl.float32)
        turned_first = (first * cos - second * sin).to(qkv.dtype.element_ty)
        turned_second = (second * cos + first * sin).to(qkv.dtype.element_ty)
        if head < HEADS:
            to = q_out + (token * HEADS + head) * (2 * HALF) + index
            tl.store(to, turned_first, mask=inside)
            tl.store(to + HALF, turned_second, mask=inside)
        else:
            to = k_cache + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + index
            tl.store(to, turned_first, mask=kept)
            tl.store(to + HALF, turned_second, mask=kept)
