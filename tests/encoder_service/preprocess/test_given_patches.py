"""Patches from callers: equal to those cut here, hostile ones refused with their values, none that spoils a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, settings
from tests.encoder_service.processed import given, patches_of
from tests.integration.media import clip, picture
from vitrine_vlm.encoder_service.families import build_tower, processor_settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.errors import MediaError, MediaTooLarge
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.types import MediaItem, MediaOptions, Patches

# 2 x 4 x 6 patches of 3 * 2 * 16 ** 2 values
GOOD = given("video", torch.zeros(48, 1536, dtype=torch.uint8), (2, 4, 6), normalized=False, times=(0.25, 1.25))


@pytest.fixture
def preprocessor(tmp_path: Path) -> Preprocessor:
    return Preprocessor(settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), MediaLimits())


@pytest.mark.parametrize("media", [picture(1, 200, 120), clip(2, 96, 64, 21)], ids=lambda media: media.kind)
def test_they_become_what_the_media_become(tower_folder: Path, media: MediaItem) -> None:
    preprocessor = Preprocessor(processor_settings(open_checkpoint(str(tower_folder))), MediaLimits())
    item = MediaItem(media.kind, data=media.data)
    opened = preprocessor.open(item.kind, media.data or b"", MediaOptions(fps=2.0))
    times = opened.layout.timestamps_s
    for dtype, accuracy in (("uint8", 0), ("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)):
        patches = patches_of(tower_folder, item, dtype, times)
        cut = preprocessor.open_patches(item.kind, patches)
        assert (cut.layout.grid_thw, cut.layout.num_tokens) == (opened.layout.grid_thw, opened.layout.num_tokens)
        assert cut.layout.timestamps_s == times
        expected = opened.patches()
        assert (cut.patches() - expected).abs().max() <= accuracy * expected.abs().max()
        assert torch.equal(cut.patches(), cut.patches()), "normalized twice"


def test_pixels_may_be_floats(preprocessor: Preprocessor) -> None:
    pixels = torch.randint(0, 256, (24, 1536), dtype=torch.uint8)
    expected = preprocessor.open_patches("image", given("image", pixels, (1, 4, 6), normalized=False)).patches()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # all hold 0 to 255
        patches = given("image", pixels.to(dtype), (1, 4, 6), normalized=False)
        assert torch.equal(preprocessor.open_patches("image", patches).patches(), expected)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_no_value_spoils_the_rows_of_a_neighbour(qwen3_vl_folder: Path, value: float, normalized: bool) -> None:
    checkpoint = open_checkpoint(str(qwen3_vl_folder))
    tower = build_tower(checkpoint, torch.device("cpu"), torch.float32)
    preprocessor = Preprocessor(processor_settings(checkpoint), MediaLimits())
    bad = given("image", torch.full((24, 1536), value), (1, 4, 6), normalized)
    opened = preprocessor.open_patches("image", bad).patches()
    assert opened.isfinite().all() and opened.abs().max() <= 2  # 1 / std of this checkpoint
    good = torch.randn(24, 1536)
    alone = tower.forward(good, [(1, 4, 6)])
    together = tower.forward(torch.cat([opened, good]), [(1, 4, 6)] * 2)
    assert together.isfinite().all()
    assert (together[6:] - alone).abs().max() < 1e-4


def changed(**changes: object) -> Patches:
    return replace(GOOD, **changes)  # type: ignore[arg-type]


def test_the_good_ones_are_good(preprocessor: Preprocessor) -> None:
    layout = preprocessor.open_patches("video", GOOD).layout
    assert (layout.num_tokens, layout.timestamps_s) == (12, (0.25, 1.25))


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (changed(data=GOOD.data[:-1]), "73727 bytes of patches.*48 patches of 1536 values are 73728 bytes"),
        (changed(data=GOOD.data + b"0"), "73729 bytes"),
        (changed(data=b""), "0 bytes"),
        (changed(dtype="float32"), "dtype float32: 48 patches of 1536 values are 294912 bytes"),
        (changed(dtype="int64"), "dtype 'int64': accepted are uint8, float32, bfloat16, float16"),
        (changed(dtype="x" * 10_000), "dtype 'x{40}'"),
        (changed(normalized=True), "uint8 that are normalized"),
        (changed(grid_thw=(0, 4, 6)), r"grid \(0, 4, 6\)"),
        (changed(grid_thw=(2, 0, 6)), r"grid \(2, 0, 6\)"),
        (changed(grid_thw=(2, 3, 8)), r"grid \(2, 3, 8\).*h and w positive multiples of 2"),
        (changed(grid_thw=(2, 8, 3)), r"grid \(2, 8, 3\)"),
        (changed(grid_thw=(4, 4, 3)), r"grid \(4, 4, 3\)"),
        (changed(grid_thw=(1, 1 << 16, 1 << 16)), "1048576x1048576 pixels"),
        (changed(grid_thw=((1 << 32) - 1, (1 << 32) - 2, (1 << 32) - 2)), f"grid .*{(1 << 32) - 2}"),
        (changed(timestamps_s=(1.0,)), r"1 timestamps and 0.0 s between them: give 2 timestamps"),
        (changed(timestamps_s=()), r"0 timestamps and 0.0 s"),
        (changed(timestamps_s=(1.0, math.nan)), "not finite"),
        (changed(timestamps_s=(-1.0, 1.0)), "not finite or negative"),
        (changed(second_per_grid_t=math.inf), "not finite"),
    ],
    ids=range(19),
)
def test_hostile_ones_are_refused(preprocessor: Preprocessor, patches: Patches, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        preprocessor.open_patches("video", patches)


@pytest.mark.parametrize(
    "refuse",
    [
        lambda preprocessor: preprocessor.open_patches("image", changed(timestamps_s=())),
        lambda preprocessor: preprocessor.open_patches("image", changed(grid_thw=(1, 8, 6))),
    ],
)
def test_an_image_has_one_temporal_patch_and_no_times(
    preprocessor: Preprocessor, refuse: Callable[[Preprocessor], object]
) -> None:
    with pytest.raises(MediaError, match="of an image with"):
        refuse(preprocessor)


@pytest.mark.parametrize(
    ("kind", "grid_thw"), [("image", (1, 512, 514)), ("video", (1, 512, 514)), ("video", (3, 512, 512))]
)
def test_more_pixels_than_media_may_have_are_refused_before_their_bytes_are_looked_at(
    preprocessor: Preprocessor, kind: str, grid_thw: tuple[int, int, int]
) -> None:
    with pytest.raises(MediaTooLarge, match=str(grid_thw)[1:-1]):
        preprocessor.open_patches(kind, changed(grid_thw=grid_thw))  # type: ignore[arg-type]


def test_times_follow_from_the_interval_between_temporal_patches(preprocessor: Preprocessor) -> None:
    patches = changed(timestamps_s=(), second_per_grid_t=1.0)
    layout = preprocessor.open_patches("video", patches).layout
    # Frames at 0, 0.5, 1 and 1.5 s: the mean of each pair.
    assert (layout.timestamps_s, layout.second_per_grid_t) == ((0.25, 1.25), 1.0)
