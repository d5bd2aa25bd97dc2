"""Buckets cover the usual batches and pad little."""

from __future__ import annotations

import random

import pytest

from vitrine_vlm.encoder_service.gpu.batch_tables import Layouts
from vitrine_vlm.encoder_service.gpu.graphs import Bucket, capture_buckets

MAX_PATCHES = 45056
BUCKETS = capture_buckets(MAX_PATCHES)


def bucket_of(grids: list[tuple[int, int, int]], window_tokens: int = 0) -> Bucket | None:
    layouts = Layouts(grids, 2, window_tokens)
    return next((bucket for bucket in BUCKETS if bucket.holds(layouts)), None)


def test_sizes_ascend_to_the_limit() -> None:
    sizes = [bucket.num_patches for bucket in BUCKETS]
    assert sizes == sorted(sizes)
    assert sizes[-1] == MAX_PATCHES
    assert len(set(BUCKETS)) == len(BUCKETS) < 600
    assert capture_buckets(0) == []
    assert [bucket.num_patches for bucket in capture_buckets(100)] == [100, 100]


def test_padding_waste_on_mixed_pictures_is_small() -> None:
    rng = random.Random(0)
    num_real = num_computed = 0
    for _ in range(500):
        grids = [(1, 2 * rng.randint(4, 45), 2 * rng.randint(4, 45)) for _ in range(rng.randint(1, 6))]
        bucket = bucket_of(grids, window_tokens=4)
        assert bucket is not None
        num_real += sum(h * w for _, h, w in grids)
        num_computed += bucket.num_patches
    assert num_computed / num_real - 1 < 0.12


@pytest.mark.parametrize(
    "grids",
    [
        [(1, 2, 2)],
        [(1, 36, 36)] * 32,
        [(384, 8, 8)],
        [(1, 150, 300)],
        [(1, 4, 4)] * 200,
    ],
    ids=["one token", "32 pictures", "a long video", "one huge picture", "200 tiny pictures"],
)
def test_usual_batches_have_a_bucket(grids: list[tuple[int, int, int]]) -> None:
    assert bucket_of(grids) is not None


def test_too_large_a_batch_has_none() -> None:
    assert bucket_of([(1, 214, 212)]) is None
    assert bucket_of([(1, 2, 2)] * 8000) is None
