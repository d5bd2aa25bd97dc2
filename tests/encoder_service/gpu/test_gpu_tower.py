"""The GPU path against the plain tower in fp32, with true widths and few layers: accuracy, then the traps of graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.vit import draw_weights
from vitrine_vlm.encoder_service.families import Family, qwen2_5_vl, qwen3_5, qwen3_omni, qwen3_vl

pytestmark = pytest.mark.gpu

SHARED = {"depth": 4, "num_heads": 16, "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN3_VL = SHARED | {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "hidden_act": "gelu_pytorch_tanh",
    "patch_size": 16,
    "out_hidden_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [0, 1, 3],
}
QWEN2_5_VL = SHARED | {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "hidden_act": "silu",
    "patch_size": 14,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
}
CASES: dict[str, tuple[Family, dict[str, Any]]] = {
    "qwen3_vl": (qwen3_vl.FAMILY, {"vision_config": QWEN3_VL}),
    "qwen3_5": (qwen3_5.FAMILY, {"vision_config": QWEN3_VL}),
    "qwen3_omni": (qwen3_omni.FAMILY, {"thinker_config": {"vision_config": QWEN3_VL}}),
    "qwen2_5_vl": (qwen2_5_vl.FAMILY, {"vision_config": QWEN2_5_VL}),
}
MIXED = [(1, 36, 36), (1, 20, 48), (3, 10, 12), (1, 44, 80), (1, 2, 2), (1, 8, 8), (1, 64, 40)]
MIN_COSINE = 0.9995
MAX_GRAPH_PATCHES = 12288


# Two roundings of 2.6 % each a product, without end: see docs/performance.md.
MIN_FP8_COSINE = 0.99


@dataclass(frozen=True)
class Case:
    family: Family
    plain: Any
    low: Any  # the same in bfloat16
    fused: Any
    graphed: Any
    patch_width: int

    def patches(self, grids: list[tuple[int, int, int]], seed: int = 0) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        num_patches = sum(t * h * w for t, h, w in grids)
        return torch.randn((num_patches, self.patch_width), device="cuda", generator=generator).clamp(-2, 2)

    def check(self, grids: list[tuple[int, int, int]], seed: int = 0) -> torch.Tensor:
        """Rows of the graphed tower, after each of them was found close to the plain one's."""
        patches_PX = self.patches(grids, seed)
        rows_TW: torch.Tensor = self.graphed.forward(patches_PX, grids)
        assert cosine(rows_TW, self.plain.forward(patches_PX, grids), self.plain.out_hidden_size).min() >= MIN_COSINE
        return rows_TW


def cosine(rows_TW: torch.Tensor, expected_TW: torch.Tensor, width: int) -> torch.Tensor:
    """Of every block of every row; NaN anywhere fails any comparison."""
    blocks, expected = (each.float().unflatten(1, (-1, width)) for each in (rows_TW, expected_TW))
    return F.cosine_similarity(blocks, expected, dim=-1)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    from vitrine_vlm.encoder_service.gpu.graphs import GpuTower
    from vitrine_vlm.encoder_service.gpu.linear import BlockLinears
    from vitrine_vlm.gpu_kernels.packed_attention import autotuned_attention

    family, config_json = CASES[request.param]
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain: Any = family.build(config_json)
    draw_weights(plain)
    plain = plain.eval()
    low = copy.deepcopy(plain).to(torch.bfloat16)
    config = plain.config
    attention = autotuned_attention(config.num_heads, config.head_dim, torch.device("cuda"), torch.bfloat16)
    linears = BlockLinears(sizes=(MAX_GRAPH_PATCHES,))
    fused: Any = family.fuse(low, attention, linears)
    yield Case(family, plain, low, fused, GpuTower(fused, MAX_GRAPH_PATCHES), config.patch_width)


def test_every_row_is_close_to_fp32(case: Case) -> None:
    case.check(MIXED)
    assert case.graphed.stats().num_replayed > 0


def test_without_graphs_it_is_the_same(case: Case) -> None:
    from vitrine_vlm.encoder_service.gpu.graphs import GpuTower

    patches_PX = case.patches(MIXED)
    eager = GpuTower(case.fused, 0)
    assert cosine(eager.forward(patches_PX, MIXED), case.graphed.forward(patches_PX, MIXED), 512).min() > 0.9999
    assert (eager.stats().num_eager, eager.stats().num_replayed) == (1, 0)


def test_fp8_rows_are_close_to_fp32_and_the_same_with_graphs(case: Case) -> None:
    from vitrine_vlm.encoder_service.gpu.tower import gpu_tower

    grids = MIXED[:4]
    patches_PX = case.patches(grids)
    expected_TW = case.plain.forward(patches_PX, grids)
    graphed, eager = (gpu_tower(case.low, case.family.fuse, size, lambda *_: None, fp8=True) for size in (8192, 0))
    rows_TW = graphed.forward(patches_PX, grids)
    assert cosine(rows_TW, expected_TW, case.plain.out_hidden_size).min() >= MIN_FP8_COSINE
    assert cosine(rows_TW, eager.forward(patches_PX, grids), 512).min() > 0.9999
    assert graphed.stats().num_replayed == eager.stats().num_eager == 1


def test_too_large_a_batch_runs_without_a_graph_and_is_counted(case: Case) -> None:
    before = case.graphed.stats().num_eager
    case.check([(1, 64, 64)] * 4)
    assert case.graphed.stats().num_eager == before + 1


def test_small_large_small(case: Case) -> None:
    first = case.check([(1, 2, 2)])
    case.check([(1, 80, 80)], seed=1)
    assert torch.equal(case.check([(1, 2, 2)]), first)


def test_same_shape_a_b_a_and_no_aliasing(case: Case) -> None:
    grids = [(1, 36, 36)]
    first = case.check(grids, seed=1)
    kept = first.clone()
    second = case.check(grids, seed=2)
    assert not torch.equal(first, second)
    assert torch.equal(first, kept), "a later batch overwrote rows that were handed out"
    assert torch.equal(case.check(grids, seed=1), kept)


def test_equal_patch_total_with_different_segments(case: Case) -> None:
    case.check([(1, 32, 32)])
    case.check([(1, 16, 32), (1, 16, 32)])
    case.check([(4, 16, 16)])
    case.check([(1, 4, 256)])


def test_garbage_in_padding_never_reaches_rows(case: Case) -> None:
    case.check([(1, 40, 40)])
    case.graphed._patches_PX.fill_(1e4)
    case.graphed._rows_TW.fill_(float("nan"))
    case.check([(1, 38, 40)])
    case.check([(1, 2, 2)])


def test_many_tiny_images_and_a_video(case: Case) -> None:
    case.check([(1, 4, 4)] * 200)
    case.check([(50, 8, 8)])


def test_equal_image_twice(case: Case) -> None:
    one = case.patches([(1, 36, 36)])
    rows_TW = case.graphed.forward(torch.cat([one, one]), [(1, 36, 36)] * 2)
    first, second = rows_TW.chunk(2)
    assert cosine(first, second, 512).min() > 0.9999


def test_wrong_shapes_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="patches have shape"):
        case.graphed.forward(case.patches([(1, 4, 4)]), [(1, 4, 6)])
