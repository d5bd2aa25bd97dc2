"""What the encoder's GPU path reaches: `python -m benchmarks.encoder` prints one Markdown table.

Random weights of the published dims; pictures come as patches that are on the GPU already. The floor is the time the
operations of matrix products and attention would take at 790 TFLOP/s, what a large bf16 product reaches on an H200.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.towers import QWEN3_VL_8B, Towers, operations, qwen3_vl_8b
from encoder_service.gpu.attention import fastest_attention
from encoder_service.gpu.graphs import GpuTower
from encoder_service.gpu.qwen3_vl import FusedQwen3VL
from encoder_service.gpu.timing import median_ms
from encoder_service.models.grids import GridTHW

_CEILING_FLOP_PER_S = 790e12
_MAX_BATCH_PATCHES = 45056
_WARM_UPS, _REPEATS = 3, 20
_SLOW_REPEATS = 5
_FACTOR = 32
_NUM_MIXED, _SMALLEST_SIDE, _LARGEST_SIDE = 512, 224, 1440


@dataclass(frozen=True)
class Case:
    name: str
    grids: tuple[GridTHW, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of rows, such as 560x560x32")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda")
    towers = qwen3_vl_8b(device)
    config = towers.plain.config
    attention = fastest_attention(config.num_heads, config.head_dim, device, torch.bfloat16)
    graphed = GpuTower(FusedQwen3VL(towers.plain, attention), _MAX_BATCH_PATCHES)
    stats = graphed.stats()
    print(f"\n{stats.num_graphs} graphs, {stats.graph_nbytes / 2**30:.2f} GiB, captured in {graphed.capture_s:.1f} s\n")
    print("| figure | ours, ms | img/s | of the floor | transformers, ms | times faster |\n|---|---|---|---|---|---|")
    for case in _cases():
        if not options.only or case.name in options.only:
            print(_row(case, graphed, towers), flush=True)
    if not options.only or "mixed" in options.only:
        print(_mixed_row(graphed), flush=True)
    return 0


def _cases() -> list[Case]:
    small, wide, large = _grid(560, 560), _grid(1280, 720), _grid(1920, 1080)
    return [
        Case("560x560x1", (small,)),
        Case("560x560x32", (small,) * 32),
        Case("1280x720x1", (wide,)),
        Case("1280x720x8", (wide,) * 8),
        Case("1920x1080x4", (large,) * 4),
    ]


def _grid(width: int, height: int) -> GridTHW:
    return 1, 2 * round(height / _FACTOR), 2 * round(width / _FACTOR)


def _row(case: Case, graphed: GpuTower, towers: Towers) -> str:
    grids = list(case.grids)
    patches_PX = _patches(grids)
    grid_thw = torch.tensor(grids, device="cuda")

    def theirs() -> None:
        with torch.inference_mode():
            towers.transformers(patches_PX, grid_thw=grid_thw)

    ms = _median_ms(lambda: graphed.forward(patches_PX, grids), _REPEATS)
    their_ms = _median_ms(theirs, _SLOW_REPEATS)
    share = _floor_ms(grids) / ms
    rate = len(grids) / ms * 1e3
    return f"| {case.name} | {ms:.2f} | {rate:.1f} | {share:.3f} | {their_ms:.1f} | {their_ms / ms:.2f} |"


def _mixed_row(graphed: GpuTower) -> str:
    """Pictures of log-uniform sizes, in batches as the batcher forms them."""
    batches = list(_batches(_mixed_grids()))
    patches = [_patches(grids) for grids in batches]

    def ours() -> None:
        for patches_PX, grids in zip(patches, batches, strict=True):
            graphed.forward(patches_PX, grids)

    ms = _median_ms(ours, _SLOW_REPEATS)
    num_real = sum(len(each) for each in patches)
    buckets = [graphed.bucket_of(grids) for grids in batches]
    num_computed = sum(
        bucket.num_patches if bucket else len(each) for bucket, each in zip(buckets, patches, strict=True)
    )
    floor_ms = sum(map(_floor_ms, batches))
    waste = num_computed / num_real - 1
    num_images = sum(map(len, batches))
    return (
        f"| mixed, {num_images} images in {len(batches)} batches, padding {waste:.1%} | {ms:.1f} | "
        f"{num_images / ms * 1e3:.1f} | {floor_ms / ms:.3f} | | |"
    )


def _mixed_grids() -> list[GridTHW]:
    rng = random.Random(0)

    def side() -> int:
        growth: float = (_LARGEST_SIDE / _SMALLEST_SIDE) ** rng.random()
        return round(_SMALLEST_SIDE * growth)

    return [_grid(side(), side()) for _ in range(_NUM_MIXED)]


def _batches(grids: list[GridTHW]) -> Iterator[list[GridTHW]]:
    batch: list[GridTHW] = []
    num_patches = 0
    for grid in grids:
        size = grid[0] * grid[1] * grid[2]
        if batch and num_patches + size > _MAX_BATCH_PATCHES:
            yield batch
            batch, num_patches = [], 0
        batch.append(grid)
        num_patches += size
    yield batch


def _patches(grids: list[GridTHW]) -> torch.Tensor:
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.empty((num_patches, 3 * 2 * 16 * 16), device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)


def _floor_ms(grids: list[GridTHW]) -> float:
    return operations(QWEN3_VL_8B, grids) / _CEILING_FLOP_PER_S * 1e3


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    for _ in range(_WARM_UPS):
        work()
    return median_ms(work, repeats)


if __name__ == "__main__":
    sys.exit(main())
