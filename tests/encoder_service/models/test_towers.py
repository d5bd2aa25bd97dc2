"""Towers against those of transformers, fp32 on the CPU, main embedding and every deepstack layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from tests.encoder_service.models.reference import (
    random_patches,
    random_reference,
    reference_from_folder,
    reference_rows,
)
from vitrine_vlm.encoder_service.families import build_tower, qwen2_5_vl, qwen3_vl
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

MAX_DIFFERENCE = 1e-4
CPU = torch.device("cpu")

# Windows of Qwen2.5-VL are 4 x 4 tokens, that is 8 x 8 patches.
GRIDS: dict[str, list[GridTHW]] = {
    "one token": [(1, 2, 2)],
    "exact multiple of the window": [(1, 16, 8)],
    "one window": [(1, 8, 8)],
    "odd token grid": [(1, 10, 14)],
    "one row of tokens": [(1, 2, 30)],
    "video": [(3, 6, 10)],
    "several sizes": [(1, 6, 10), (1, 2, 2), (1, 16, 16), (2, 10, 4), (1, 26, 18)],
}


def towers_of(folder: Path) -> tuple[VisionTower, Any]:
    return build_tower(open_checkpoint(str(folder)), CPU, torch.float32), reference_from_folder(folder)


def patch_width_of(reference: Any) -> int:
    config = reference.config
    return int(config.in_channels * config.temporal_patch_size * config.patch_size**2)


def assert_rows_equal(tower: VisionTower, reference: Any, grid_thw: list[GridTHW]) -> None:
    patches = random_patches(grid_thw, patch_width_of(reference))
    rows, expected = tower.forward(patches, grid_thw), reference_rows(reference, patches, grid_thw)
    assert rows.shape == expected.shape == (sum(t * h * w // 4 for t, h, w in grid_thw), tower.row_width)
    assert expected.std() > 0.1, "weights too small for a difference to show"
    for block, (got, want) in enumerate(
        zip(rows.split(tower.out_hidden_size, 1), expected.split(tower.out_hidden_size, 1), strict=True)
    ):
        difference = (got - want).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"block {block} of the rows differs by {difference}"


@pytest.mark.parametrize("grid_thw", GRIDS.values(), ids=GRIDS.keys())
def test_rows_equal_transformers(tower_folder: Path, grid_thw: list[GridTHW]) -> None:
    tower, reference = towers_of(tower_folder)
    assert_rows_equal(tower, reference, grid_thw)


def test_an_image_does_not_depend_on_what_is_packed_beside_it(tower_folder: Path) -> None:
    tower, reference = towers_of(tower_folder)
    grid: GridTHW = (1, 10, 6)
    width = patch_width_of(reference)
    image, other = random_patches([grid], width, seed=1), random_patches([(1, 12, 8)], width, seed=2)
    packed = tower.forward(torch.cat([image, other, image]), [grid, (1, 12, 8), grid])
    alone = tower.forward(image, [grid])
    assert (packed[:15] - alone).abs().max() <= MAX_DIFFERENCE
    assert (packed[-15:] - alone).abs().max() <= MAX_DIFFERENCE
    assert (packed[:15] - tower.forward(other[:60], [grid])).abs().max() > 0.1, "rows do not depend on the image"


def test_equal_patch_totals_with_different_segments_differ(tower_folder: Path) -> None:
    tower, reference = towers_of(tower_folder)
    for grid_thw in ([(1, 8, 16)], [(1, 16, 8)], [(2, 8, 8)], [(1, 8, 8), (1, 8, 8)]):
        assert_rows_equal(tower, reference, grid_thw)


def test_frames_of_a_video_do_not_attend_to_each_other(tower_folder: Path) -> None:
    tower, reference = towers_of(tower_folder)
    frames = random_patches([(2, 6, 6)], patch_width_of(reference))
    video, second = tower.forward(frames, [(2, 6, 6)]), tower.forward(frames[36:], [(1, 6, 6)])
    assert (video[9:] - second).abs().max() <= MAX_DIFFERENCE


def test_bfloat16_follows_float32(tower_folder: Path) -> None:
    tower, reference = towers_of(tower_folder)
    half = build_tower(open_checkpoint(str(tower_folder)), CPU, torch.bfloat16)
    patches = random_patches([(1, 6, 10)], patch_width_of(reference))
    rows = half.forward(patches, [(1, 6, 10)])
    assert rows.dtype == torch.bfloat16
    expected = tower.forward(patches, [(1, 6, 10)])
    assert (rows.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("grid_thw", "num_patches"),
    [([(1, 4, 4)], 15), ([(1, 3, 4)], 12), ([(1, 0, 4)], 0), ([], 0), ([(1, 2, 2), (1, 2, 2)], 4)],
)
def test_grids_that_do_not_fit_are_refused(qwen3_vl_folder: Path, grid_thw: list[GridTHW], num_patches: int) -> None:
    tower = build_tower(open_checkpoint(str(qwen3_vl_folder)), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"grid|patches"):
        tower.forward(torch.zeros(num_patches, 3 * 2 * 16 * 16), grid_thw)


def true_dims(family: str) -> Any:
    """Released vision dims at depth 1 or 2: 8B dense, 30B-A3B MoE, Qwen2.5-VL-7B."""
    qwen3 = {
        "depth": 2,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0],
    }
    if family == "qwen3_vl":
        return Qwen3VLConfig(vision_config=qwen3 | {"out_hidden_size": 4096})
    if family == "qwen3_vl_moe":
        return Qwen3VLMoeConfig(vision_config=qwen3 | {"out_hidden_size": 2048, "depth": 1})
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 3584,
        }
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_layers_at_true_dims_equal_transformers(family: str) -> None:
    config = true_dims(family)
    reference = random_reference(family, config.vision_config)
    parsed = config.to_dict()
    with torch.device("meta"):
        tower = (qwen2_5_vl if family == "qwen2_5_vl" else qwen3_vl).FAMILY.build(parsed)
    tower.load_state_dict(reference.state_dict(), strict=True, assign=True)
    assert_rows_equal(tower, reference, [(1, 10, 18), (1, 2, 2), (2, 8, 8)])
