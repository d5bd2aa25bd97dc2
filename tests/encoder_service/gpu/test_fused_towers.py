"""The fused towers against transformers', without a GPU: kernels in Triton's interpreter, attention by plain torch.

What a GPU adds (bfloat16, flash-attn, graphs) is in test_gpu_tower.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoder_service.models.reference import random_patches, reference_from_folder, reference_rows
from vitrine_vlm.encoder_service.families import build_tower, family_of
from vitrine_vlm.encoder_service.models.attention import packed_attention
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu_tower.py runs the real thing")
from vitrine_vlm.encoder_service.gpu.accuracy import measure_accuracy  # noqa: E402
from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables, Layouts, TableShape  # noqa: E402
from vitrine_vlm.encoder_service.gpu.linear import BlockLinears  # noqa: E402
from vitrine_vlm.gpu_kernels.packed_attention import Bounds  # noqa: E402

GRIDS = [(1, 10, 12), (2, 4, 4), (1, 2, 2)]
# Triton's interpreter takes its time.
FEW = [(1, 4, 6), (1, 2, 2)]
IMAGE_AND_VIDEO = [(1, 2, 4), (2, 2, 2)]
PADDING = 12
MAX_DIFFERENCE = 1e-4
NUM_EMPTY = 5


class PlainAttention:
    """Attention as on the CPU; rows of padding are left unwritten, and filled with NaN to show it."""

    name = "plain"

    def padded_head_dim(self, head_dim: int) -> int:
        return head_dim + 16

    def __call__(
        self,
        q_THE: torch.Tensor,
        k_LKE: torch.Tensor,
        v_LKD: torch.Tensor,
        bounds: Bounds,
        *,
        scale: float,
        causal: bool = False,
    ) -> torch.Tensor:
        assert not causal
        num_patches, _, head_dim = v_LKD.shape
        num_real = int(bounds.cu_queries[-1])
        cu_seqlens = torch.unique(bounds.cu_queries)  # without empty segments
        padded = q_THE.shape[-1]
        # Its own scale is by the width it sees, which is the padded one.
        q = q_THE[:num_real] * scale * padded**0.5
        v = torch.nn.functional.pad(v_LKD[:num_real], (0, padded - head_dim))
        out = torch.full((num_patches, *v_LKD.shape[1:]), float("nan"))
        longest = int(cu_seqlens.diff().max())
        assert longest <= bounds.max_queries
        out[:num_real] = packed_attention(q, k_LKE[:num_real], v, cu_seqlens, longest)[..., :head_dim]
        return out


def plain_and_fused(folder: Path, *, fp8: bool) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(str(folder))
    plain = build_tower(checkpoint, torch.device("cpu"), torch.float32)
    return plain, family_of(checkpoint).fuse(plain, PlainAttention(), BlockLinears(fp8))


def expected_and_fused_rows(folder: Path, grids: list[GridTHW], *, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' rows and those of the fused tower, which gets padding, too."""
    plain, fused = plain_and_fused(folder, fp8=fp8)
    layouts = Layouts(grids, fused.merge_size, fused.window_tokens)
    exact = layouts.shape
    shape = TableShape(exact.num_segments + NUM_EMPTY, exact.num_windows + NUM_EMPTY, exact.max_seqlen)
    tables = BatchTables.of(torch.tensor(layouts.values(shape), dtype=torch.int32), shape)
    patches_PX = random_patches([*grids, (1, 1, PADDING)], plain.config.patch_width)
    rows_TW = torch.full((len(patches_PX) // fused.merge_unit, fused.row_width), float("nan"))
    fused.run(patches_PX, tables, rows_TW)
    expected_TW = reference_rows(reference_from_folder(folder), patches_PX[: layouts.num_patches], grids)
    return expected_TW, rows_TW[: len(expected_TW)]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_rows_equal_transformers(request: pytest.FixtureRequest, family: str) -> None:
    assert_rows_equal_transformers(request.getfixturevalue(f"{family}_folder"), GRIDS)


def test_rows_of_families_with_the_same_kernels_equal_transformers(tower_only_folder: Path) -> None:
    assert_rows_equal_transformers(tower_only_folder, IMAGE_AND_VIDEO)


def assert_rows_equal_transformers(folder: Path, grids: list[GridTHW]) -> None:
    expected_TW, rows_TW = expected_and_fused_rows(folder, grids, fp8=False)
    assert expected_TW.std() > 0.1, "weights too small for a difference to show"
    assert (rows_TW - expected_TW).abs().max() <= MAX_DIFFERENCE


def test_fp8_rows_are_close_to_transformers(qwen3_vl_folder: Path) -> None:
    # The other tower's windows need bfloat16 products, which Triton's interpreter gets wrong.
    expected_TW, rows_TW = expected_and_fused_rows(qwen3_vl_folder, FEW, fp8=True)
    assert torch.nn.functional.cosine_similarity(rows_TW, expected_TW, dim=1).min() > 0.99
    assert not torch.allclose(rows_TW, expected_TW, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_accuracy_is_measured_layer_by_layer(request: pytest.FixtureRequest, family: str) -> None:
    plain, fused = plain_and_fused(request.getfixturevalue(f"{family}_folder"), fp8=False)
    accuracy = measure_accuracy(plain, fused, FEW)
    assert len(accuracy.layers) == plain.config.depth
    assert len(accuracy.rows) == 1 + len(plain.deepstack_visual_indexes)
    assert min(accuracy.layers + accuracy.rows) > 0.9999
    assert "main rows" in str(accuracy) and "behind block 0: " in str(accuracy)
    fused._layers[-1].shift_after += 2.0
    assert measure_accuracy(plain, fused, FEW).layers[-1] < 0.99
