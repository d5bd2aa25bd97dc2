"""The fused towers against the plain ones, without a GPU: kernels in Triton's interpreter, attention by plain torch.

What a GPU adds (bfloat16, flash-attn, graphs) is in test_gpu_tower.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_transport.checkpoint import open_checkpoint
from encoder_service.models import build_tower
from encoder_service.models.attention import packed_attention
from encoder_service.models.grids import GridTHW

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu_tower.py runs the real thing")
from encoder_service.gpu.accuracy import measured_accuracy  # noqa: E402
from encoder_service.gpu.batch_tables import BatchTables, Layouts, TableShape  # noqa: E402
from encoder_service.gpu.linear import BlockLinears  # noqa: E402
from encoder_service.gpu.qwen2_5_vl import FusedQwen2_5VL  # noqa: E402
from encoder_service.gpu.qwen3_vl import FusedQwen3VL  # noqa: E402

GRIDS = [(1, 10, 12), (2, 4, 4), (1, 2, 2)]
FEW = [(1, 4, 6), (1, 2, 2)]  # Triton's interpreter takes its time
PADDING = 12
NUM_EMPTY = 5


class PlainAttention:
    """Attention as on the CPU; rows of padding are left unwritten, and filled with NaN to show it."""

    name = "plain"

    def __init__(self, padded_head_dim: int) -> None:
        self.padded_head_dim = padded_head_dim

    def __call__(
        self,
        q_PHE: torch.Tensor,
        k_PHE: torch.Tensor,
        v_PHD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> torch.Tensor:
        num_patches, _, head_dim = v_PHD.shape
        num_real = int(cu_seqlens[-1])
        bounds = torch.unique(cu_seqlens)  # without empty segments
        # Its own scale is by the width it sees, which is the padded one.
        q = q_PHE[:num_real] * scale * self.padded_head_dim**0.5
        v = torch.nn.functional.pad(v_PHD[:num_real], (0, self.padded_head_dim - head_dim))
        out = torch.full((num_patches, *v_PHD.shape[1:]), float("nan"))
        longest = int(bounds.diff().max())
        assert longest <= max_seqlen
        out[:num_real] = packed_attention(q, k_PHE[:num_real], v, bounds, longest)[..., :head_dim]
        return out


def plain_and_fused(request: pytest.FixtureRequest, family: str, *, fp8: bool) -> tuple[Any, Any]:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    plain = build_tower(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32)
    config = plain.config
    attention = PlainAttention(config.head_dim + 16)
    fused: Any = (FusedQwen3VL if family == "qwen3_vl" else FusedQwen2_5VL)(plain, attention, BlockLinears(fp8))  # type: ignore[arg-type]
    return plain, fused


def plain_and_fused_rows(
    request: pytest.FixtureRequest, family: str, grids: list[GridTHW], *, fp8: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    plain, fused = plain_and_fused(request, family, fp8=fp8)
    config = plain.config
    layouts = Layouts(grids, fused.merge_size, fused.window_tokens)
    exact = layouts.shape
    shape = TableShape(exact.num_segments + NUM_EMPTY, exact.num_windows + NUM_EMPTY, exact.max_seqlen)
    tables = BatchTables.of(torch.tensor(layouts.values(shape), dtype=torch.int32), shape)
    patches_PX = torch.randn(
        layouts.num_patches + PADDING, config.patch_width, generator=torch.Generator().manual_seed(0)
    )
    rows_TW = torch.full((len(patches_PX) // fused.merge_unit, fused.row_width), float("nan"))
    fused.run(patches_PX, tables, rows_TW)

    expected_TW = plain.forward(patches_PX[: layouts.num_patches], grids)
    return expected_TW, rows_TW[: len(expected_TW)]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_rows_equal_the_plain_towers(request: pytest.FixtureRequest, family: str) -> None:
    expected_TW, rows_TW = plain_and_fused_rows(request, family, GRIDS, fp8=False)
    # torch's fused product on a CPU has the exact GELU only; the tower has the one by tanh.
    torch.testing.assert_close(rows_TW, expected_TW, atol=5e-3, rtol=5e-3)
    assert (rows_TW - expected_TW).abs().mean() < 5e-4


def test_fp8_rows_are_close_to_the_plain_towers(request: pytest.FixtureRequest) -> None:
    # The other family's windows need bfloat16 products, which Triton's interpreter gets wrong.
    expected_TW, rows_TW = plain_and_fused_rows(request, "qwen3_vl", FEW, fp8=True)
    assert torch.nn.functional.cosine_similarity(rows_TW, expected_TW, dim=1).min() > 0.99
    assert not torch.allclose(rows_TW, expected_TW, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_accuracy_is_measured_layer_by_layer(request: pytest.FixtureRequest, family: str) -> None:
    plain, fused = plain_and_fused(request, family, fp8=False)
    accuracy = measured_accuracy(plain, fused, FEW)
    assert len(accuracy.layers) == plain.config.depth
    assert len(accuracy.rows) == 1 + len(plain.deepstack_visual_indexes)
    assert min(accuracy.layers + accuracy.rows) > 0.9999
    assert "main rows" in str(accuracy) and "behind block 0: " in str(accuracy)
    fused._layers[-1].shift_after += 2.0
    assert measured_accuracy(plain, fused, FEW).layers[-1] < 0.99
