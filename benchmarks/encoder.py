"""Measures the encoder's GPU path: `python -m benchmarks.encoder` prints one Markdown table.

The towers have random weights at the published dims; the patches are on the GPU already. The floor is the time the
operations of matrix products and attention take at 790 TFLOP/s, which a large bf16 product reaches on an H200.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.vit import QWEN3_VL_8B, VitPair, operations, qwen2_5_vl_7b, qwen3_vl_8b
from vitrine_vlm.encoder_service.gpu.graphs import GpuTower
from vitrine_vlm.encoder_service.gpu.tower import gpu_tower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.gpu_kernels.timing import median_ms

_CEILING_FLOP_PER_S = 790e12
_MAX_BATCH_PATCHES = 45056
_WARM_UPS, _REPEATS = 3, 20
_SLOW_REPEATS = 5
_NUM_MIXED, _SMALLEST_SIDE, _LARGEST_SIDE = 512, 224, 1440


@dataclass(frozen=True)
class Case:
    name: str
    grids: tuple[GridTHW, ...]


def _grid(width: int, height: int, patch_size: int = 16) -> GridTHW:
    factor = 2 * patch_size
    return 1, 2 * round(height / factor), 2 * round(width / factor)


_MANY = Case("560x560x32", (_grid(560, 560),) * 32)
_CASES = [
    Case("560x560x1", (_grid(560, 560),)),
    _MANY,
    Case("1280x720x1", (_grid(1280, 720),)),
    Case("1280x720x8", (_grid(1280, 720),) * 8),
    Case("1920x1080x4", (_grid(1920, 1080),) * 4),
]
_MIXED, _FP8, _QWEN2_5 = "mixed", "560x560x32-fp8", "qwen2.5-560x560x32"
_NAMES = [*(case.name for case in _CASES), _MIXED, _FP8, _QWEN2_5]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help=f"rows of these names: {', '.join(_NAMES)}")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    device = torch.device("cuda")
    pair = qwen3_vl_8b(device)
    graphed = _graphed(pair, fp8=False)
    names = options.only or _NAMES
    print("| figure | ours, ms | img/s | of the floor | compared with | its ms | times faster |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in _CASES:
        if case.name in names:
            print(_row(case, graphed, pair), flush=True)
    if _MIXED in names:
        print(_mixed_row(graphed), flush=True)
    if _FP8 in names:
        print(_fp8_row(graphed, _graphed(pair, fp8=True)), flush=True)
    if _QWEN2_5 in names:
        del graphed, pair
        print(_qwen2_5_row(qwen2_5_vl_7b(device)), flush=True)
    return 0


def _graphed(pair: VitPair, *, fp8: bool) -> GpuTower:
    return gpu_tower(pair.plain, pair.family.fuse, _MAX_BATCH_PATCHES, lambda num_captured, num_graphs: None, fp8=fp8)


def _row(case: Case, graphed: GpuTower, pair: VitPair) -> str:
    grids = list(case.grids)
    patches_PX = _patches(grids)
    ms = _median_ms(lambda: graphed.forward(patches_PX, grids), _REPEATS)
    return _figures(case.name, ms, grids, _floor_ms(grids), "transformers", _transformers_ms(pair, patches_PX, grids))


def _fp8_row(bf16: GpuTower, fp8: GpuTower) -> str:
    """Measures both towers right after each other, because each heats up the GPU."""
    grids = list(_MANY.grids)
    patches_PX = _patches(grids)
    bf16_ms = _median_ms(lambda: bf16.forward(patches_PX, grids), _REPEATS)
    ms = _median_ms(lambda: fp8.forward(patches_PX, grids), _REPEATS)
    return _figures(_FP8, ms, grids, None, "ours in bfloat16", bf16_ms)


def _qwen2_5_row(pair: VitPair) -> str:
    grids = [_grid(560, 560, patch_size=14)] * 32
    patches_PX = _patches(grids, patch_size=14)
    graphed = _graphed(pair, fp8=False)
    ms = _median_ms(lambda: graphed.forward(patches_PX, grids), _REPEATS)
    return _figures(_QWEN2_5, ms, grids, None, "transformers", _transformers_ms(pair, patches_PX, grids))


def _transformers_ms(pair: VitPair, patches_PX: torch.Tensor, grids: list[GridTHW]) -> float:
    grid_thw = torch.tensor(grids, device="cuda")

    def forward() -> None:
        with torch.inference_mode():
            pair.transformers(patches_PX, grid_thw=grid_thw)

    return _median_ms(forward, _SLOW_REPEATS)


def _figures(name: str, ms: float, grids: list[GridTHW], floor_ms: float | None, other: str, other_ms: float) -> str:
    share = f"{floor_ms / ms:.3f}" if floor_ms else ""
    rate = len(grids) / ms * 1e3
    return f"| {name} | {ms:.2f} | {rate:.1f} | {share} | {other} | {other_ms:.1f} | {other_ms / ms:.2f} |"


def _mixed_row(graphed: GpuTower) -> str:
    """Measures pictures of log-uniform sizes, in batches like those of the batch builder."""
    batches = list(_batches(_mixed_grids()))
    patches = [_patches(grids) for grids in batches]

    def encode_all() -> None:
        for patches_PX, grids in zip(patches, batches, strict=True):
            graphed.forward(patches_PX, grids)

    ms = _median_ms(encode_all, _SLOW_REPEATS)
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
        f"{num_images / ms * 1e3:.1f} | {floor_ms / ms:.3f} | | | |"
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


def _patches(grids: list[GridTHW], patch_size: int = 16) -> torch.Tensor:
    num_patches = sum(t * h * w for t, h, w in grids)
    return torch.empty((num_patches, 3 * 2 * patch_size**2), device="cuda", dtype=torch.bfloat16).uniform_(-1, 1)


def _floor_ms(grids: list[GridTHW]) -> float:
    return operations(QWEN3_VL_8B, grids) / _CEILING_FLOP_PER_S * 1e3


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    for _ in range(_WARM_UPS):
        work()
    return median_ms(work, repeats)


if __name__ == "__main__":
    sys.exit(main())
