"""Causal attention over paged keys and values, in Triton kernels that can be captured.

A program computes a tile of tokens with the query heads that share keys and values. The tiles are listed in tables on
the GPU, so that one graph serves any mix of sequences. The past of a tile is cut into splits that are computed in
parallel and combined: the method of "Flash-Decoding" (Dao et al., 2023).

Shapes: T tokens, H query heads, K key/value heads, D head dim, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vitrine_vlm.gpu_kernels.dependent_launch import has_dependent_launch
from vitrine_vlm.gpu_kernels.fp8_weight import FP8
from vitrine_vlm.llm_worker.gpu.step_tables import KEYS_A_STEP, MAX_PROGRAMS, MAX_SPLITS, StepTables, Tiles

# tl.dot needs at least 16 rows.
_SMALLEST_TILE = 16


def tile_attention(
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    tables: StepTables,
    tiles: Tiles,
    max_tiles: int,
    most_splits: int,
    out_THD: torch.Tensor,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Computes softmax attention, scaled by D ** -0.5, of all tokens in tiles; other rows of `out_THD` are kept.

    Args:
        tables, tiles: of the step; read on the GPU only.
        max_tiles, most_splits: upper bounds of `tiles.counts`.
        kv_scales: by which keys and values of a cache in FP8 are multiplied.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads, tokens = k_cache_SKD.shape[1], tiles.tokens_a_tile
    group = num_heads // num_kv_heads
    # The result of each split; its largest score and its sum of weights.
    partial = q_THD.new_empty((num_tokens, num_heads, most_splits, head_dim), dtype=torch.float32)
    stats = q_THD.new_empty((num_tokens, num_heads, most_splits, 2), dtype=torch.float32)
    block_d, pdl = max(_SMALLEST_TILE, triton.next_power_of_2(head_dim)), has_dependent_launch(q_THD.device)
    _attend_split[(min(MAX_PROGRAMS, max_tiles * num_kv_heads * most_splits),)](
        q_THD, k_cache_SKD, v_cache_SKD, tiles.tiles, tiles.counts, tables.blocks, partial, stats, out_THD,
        tiles.tiles.stride(0), tables.blocks.stride(0), most_splits, head_dim**-0.5,
        *kv_scales,
        KV_HEADS=num_kv_heads, GROUP=group, TILE=max(_SMALLEST_TILE, triton.next_power_of_2(group * tokens)),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=tables.block_size, KEYS=KEYS_A_STEP,
        FP8_CACHE=k_cache_SKD.dtype == FP8, PDL=pdl,
        num_stages=2, launch_pdl=pdl,
    )  # fmt: skip
    if most_splits > 1:
        _join_splits[(min(MAX_PROGRAMS, max_tiles * tokens * num_heads),)](
            partial, stats, out_THD, tiles.tiles, tiles.counts, tiles.tiles.stride(0), most_splits,
            HEADS=num_heads, TOKENS=tokens, HEAD_DIM=head_dim, BLOCK_D=block_d, SPLITS=MAX_SPLITS, PDL=pdl,
            num_warps=1, launch_pdl=pdl,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most_splits"])
def _attend_split(
    q, k_cache, v_cache, tiles, counts, blocks, partial, stats, out, tiles_stride, blocks_stride,
    most_splits, scale, k_scale, v_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, FP8_CACHE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if FP8_CACHE:
        # Scaling scores is scaling keys.
        scale *= k_scale
    num_splits = tl.load(counts + 1)
    for work in range(tl.program_id(0), tl.load(counts) * KV_HEADS * num_splits, tl.num_programs(0)):
        split, kv_head, tile = work % num_splits, work // num_splits % KV_HEADS, work // num_splits // KV_HEADS
        sequence = tl.load(tiles + tile)
        first_token = tl.load(tiles + tiles_stride + tile)
        num_tokens = tl.load(tiles + 2 * tiles_stride + tile)
        first_position = tl.load(tiles + 3 * tiles_stride + tile)
        length = first_position + num_tokens
        # A multiple of KEYS, so that no two splits share an iteration.
        share = tl.cdiv(tl.cdiv(length, num_splits), KEYS) * KEYS
        start = split * share
        stop = tl.minimum(start + share, length)
        row, column = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
        token = row // GROUP
        head = (first_token + token) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
        real = token < num_tokens
        in_tile = real[:, None] & (column < HEAD_DIM)[None, :]
        queries = tl.load(q + head[:, None].to(tl.int64) * HEAD_DIM + column[None, :], mask=in_tile, other=0.0)
        last_key = first_position + token
        largest = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        attended = tl.zeros([TILE, BLOCK_D], tl.float32)
        for first in range(start, stop, KEYS):
            position = first + tl.arange(0, KEYS)
            there = position < stop
            block = tl.load(blocks + sequence * blocks_stride + position // BLOCK_SIZE, mask=there, other=0)
            slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            at = (slot * KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
            loaded = there[:, None] & (column < HEAD_DIM)[None, :]
            keys = tl.load(k_cache + at, mask=loaded, other=0.0)
            values = tl.load(v_cache + at, mask=loaded, other=0.0)
            if FP8_CACHE:
                # Without rounding: e4m3's values are among bfloat16's.
                keys, values = keys.to(queries.dtype), values.to(queries.dtype)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            seen = there[None, :] & (position[None, :] <= last_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            # A row without keys so far stays at -inf, and -inf - -inf would be NaN.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            fading = tl.exp(largest - base)
            weights = tl.exp(scores - base[:, None])
            total = total * fading + tl.sum(weights, 1)
            attended = attended * fading[:, None]
            attended += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            largest = larger
        if FP8_CACHE:
            attended *= v_scale
        if num_splits == 1:
            result = attended / tl.maximum(total, 1e-30)[:, None]
            to = out + head[:, None].to(tl.int64) * HEAD_DIM + column[None, :]
            tl.store(to, result.to(out.dtype.element_ty), mask=in_tile)
        else:
            at_split = head.to(tl.int64) * most_splits + split
            tl.store(partial + at_split[:, None] * HEAD_DIM + column[None, :], attended, mask=in_tile)
            tl.store(stats + at_split * 2, largest, mask=real)
            tl.store(stats + at_split * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["most_splits"])
def _join_splits(
    partial, stats, out, tiles, counts, tiles_stride, most_splits, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_splits = tl.load(counts + 1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    there = split < num_splits
    if num_splits > 1:
        for work in range(tl.program_id(0), tl.load(counts) * TOKENS * HEADS, tl.num_programs(0)):
            token, tile = work // HEADS % TOKENS, work // HEADS // TOKENS
            if token < tl.load(tiles + 2 * tiles_stride + tile):
                head = (tl.load(tiles + tiles_stride + tile) + token).to(tl.int64) * HEADS + work % HEADS
                at = head * most_splits + split
                largest = tl.load(stats + at * 2, mask=there, other=float("-inf"))
                total = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
                # A split without keys has weight 0.
                weight = tl.where(total > 0, tl.exp(largest - tl.max(largest, 0)), 0.0)
                loaded = there[:, None] & (column < HEAD_DIM)[None, :]
                parts = tl.load(partial + at[:, None] * HEAD_DIM + column[None, :], mask=loaded, other=0.0)
                attended = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
                tl.store(out + head * HEAD_DIM + column, attended.to(out.dtype.element_ty), mask=column < HEAD_DIM)
