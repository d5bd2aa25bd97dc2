"""Every kernel against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter (tests/__init__.py)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, settings
from vitrine_vlm.encoder_service.models import grids
from vitrine_vlm.encoder_service.models.layers import Rotary
from vitrine_vlm.encoder_service.preprocess.patchify import patchify

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
from vitrine_vlm.encoder_service.gpu import kernels, norms  # noqa: E402
from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables, Layouts, TableShape  # noqa: E402
from vitrine_vlm.encoder_service.gpu.residual import ResidualStream  # noqa: E402
from vitrine_vlm.gpu_kernels import fp8  # noqa: E402
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight  # noqa: E402
from vitrine_vlm.gpu_kernels.rotary import apply_rope, rope_table  # noqa: E402

GRIDS = [(1, 4, 6), (2, 2, 10), (1, 8, 8), (1, 14, 10)]
NUM_PATCHES = sum(t * h * w for t, h, w in GRIDS)
PADDING = 8
MERGE, WINDOW = 2, 3
HEADS, HEAD_DIM = 2, 24
NAN = float("nan")


@pytest.fixture(params=[0, 3], ids=["exact", "with empty segments"])
def tables(request: pytest.FixtureRequest) -> BatchTables:
    layouts = Layouts(GRIDS, MERGE, WINDOW)
    exact = layouts.shape
    shape = TableShape(exact.num_segments + request.param, exact.num_windows + request.param, exact.max_seqlen)
    table = torch.tensor(layouts.values(shape), dtype=torch.int32, device=DEVICE)
    return BatchTables.of(table, shape)


def places_of(tables: BatchTables, window: int) -> torch.Tensor:
    places = torch.full((NUM_PATCHES + PADDING, kernels.PLACE_WIDTH), -7, dtype=torch.int32, device=DEVICE)
    kernels.place_patches(tables.cu_seqlens, tables.frame_hw, MERGE, window, places)
    return places


def cos_sin_of(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table, and the inverse frequencies it was made from."""
    exponents = torch.arange(0, HEAD_DIM // 2, 2, dtype=torch.float32) / (HEAD_DIM // 2)
    table = torch.empty((len(places), 2, HEAD_DIM // 2), device=DEVICE)
    axis = torch.arange(2, dtype=torch.int32).repeat_interleave(len(exponents)).to(DEVICE)
    rope_table(places[:, :2].T, (1.0 / 10_000.0**exponents).repeat(2).to(DEVICE), axis, table)
    return table, exponents


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def test_patches_are_placed_in_merge_block_order(tables: BatchTables) -> None:
    places = places_of(tables, 0).cpu()
    assert torch.equal(places[:NUM_PATCHES, :2].long(), grids.patch_positions(GRIDS, MERGE))
    assert torch.equal(places[:, kernels.SOURCE_COLUMN], torch.arange(NUM_PATCHES + PADDING).int())
    sizes = torch.tensor([(h, w) for t, h, w in GRIDS for _ in range(t * h * w)])
    assert torch.equal(places[:NUM_PATCHES, 2:4].long(), sizes)
    assert places[NUM_PATCHES:, :4].tolist() == [[0, 0, 1, 1]] * PADDING


def test_patches_are_sorted_by_window(tables: BatchTables) -> None:
    places = places_of(tables, WINDOW).cpu()
    order, bounds = grids.window_order(GRIDS, MERGE, WINDOW)
    sources = torch.arange(NUM_PATCHES).view(-1, MERGE**2)[order].flatten()
    assert torch.equal(places[:NUM_PATCHES, kernels.SOURCE_COLUMN].long(), sources)
    assert torch.equal(places[:NUM_PATCHES, :2].long(), grids.patch_positions(GRIDS, MERGE)[sources])
    assert torch.equal(tables.window_cu_seqlens.cpu()[: len(bounds)], bounds)
    assert tables.window_cu_seqlens[-1] == NUM_PATCHES


def test_rotary_table(tables: BatchTables) -> None:
    table, _ = cos_sin_of(places_of(tables, 0))
    expected = Rotary.at(grids.patch_positions(GRIDS, MERGE), HEAD_DIM, 10_000.0)
    for column, values in ((0, expected.cos_P1D), (1, expected.sin_P1D)):
        torch.testing.assert_close(table[:NUM_PATCHES, column].cpu(), values[:, 0, : HEAD_DIM // 2])


def test_position_embeddings_are_interpolated(tables: BatchTables) -> None:
    side, channels = 9, 40
    table, x = random(side * side, channels), random(NUM_PATCHES + PADDING, channels)
    before = x.clone()
    kernels.add_position_embeddings(x, table, places_of(tables, 0), side)
    entries, weights = grids.interpolation_taps(GRIDS, MERGE, side)
    expected = (table.cpu()[entries] * weights[:, :, None]).sum(1)
    torch.testing.assert_close((x - before)[:NUM_PATCHES].cpu(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [24, 32, 80])
def test_queries_and_keys_are_rotated(tables: BatchTables, padded: int) -> None:
    qkv = random(NUM_PATCHES + PADDING, 3 * HEADS * HEAD_DIM)
    table, _ = cos_sin_of(places_of(tables, 0))
    q, k, v = apply_rope(qkv, table, HEADS, padded)
    rotary = Rotary.at(grids.patch_positions(GRIDS, MERGE), HEAD_DIM, 10_000.0)
    apart = qkv[:NUM_PATCHES].view(NUM_PATCHES, 3, HEADS, HEAD_DIM).cpu()
    for rotated, plain in ((q, apart[:, 0]), (k, apart[:, 1])):
        torch.testing.assert_close(rotated[:NUM_PATCHES, :, :HEAD_DIM].cpu(), rotary.apply(plain))
        assert (rotated[:, :, HEAD_DIM:] == 0).all()
    assert torch.equal(v[:NUM_PATCHES].cpu(), apart[:, 2])


@pytest.mark.parametrize("patches_a_row", [1, 4])
def test_layer_norm_adds_the_shift_and_zeroes_padding(tables: BatchTables, patches_a_row: int) -> None:
    channels = 40
    shift, (weight, bias) = random(channels), random(2, channels * patches_a_row)
    x = random((NUM_PATCHES + PADDING) // patches_a_row, channels * patches_a_row)
    real = NUM_PATCHES // patches_a_row
    x[real:] = NAN
    out = norms.layer_norm(ResidualStream(x), shift, weight, bias, tables.cu_seqlens)
    assert isinstance(out, torch.Tensor)
    expected = F.layer_norm(x[:real] + shift.repeat(patches_a_row), weight.shape, weight, bias, 1e-6)
    torch.testing.assert_close(out[:real], expected, atol=1e-5, rtol=1e-5)
    assert (out[real:] == 0).all()


def test_rms_norm_adds_the_shift_and_zeroes_padding(tables: BatchTables) -> None:
    channels = 40
    shift, weight = random(2, channels)
    x = random(NUM_PATCHES + PADDING, channels)
    x[NUM_PATCHES:] = NAN
    out = norms.rms_norm(ResidualStream(x), shift, weight, tables.cu_seqlens)
    assert isinstance(out, torch.Tensor)
    expected = F.rms_norm(x[:NUM_PATCHES] + shift, (channels,), weight, 1e-6)
    torch.testing.assert_close(out[:NUM_PATCHES], expected, atol=1e-5, rtol=1e-5)
    assert (out[NUM_PATCHES:] == 0).all()


@pytest.mark.parametrize("patches_a_row", [1, 4])
def test_a_norm_adds_the_deferred_product_to_the_stream(tables: BatchTables, patches_a_row: int) -> None:
    channels = 40
    shift, (weight, bias) = random(channels), random(2, channels * patches_a_row)
    x, deferred = random(2, NUM_PATCHES + PADDING, channels).unbind()
    updated = x + deferred
    plain = norms.layer_norm(ResidualStream(updated.clone()), shift, weight, bias, tables.cu_seqlens)
    stream = ResidualStream(x)
    stream.defer(deferred)
    out = norms.layer_norm(stream, shift, weight, bias, tables.cu_seqlens)
    assert isinstance(out, torch.Tensor) and isinstance(plain, torch.Tensor)
    assert torch.equal(out, plain)
    assert torch.equal(x[:NUM_PATCHES], updated[:NUM_PATCHES])
    assert stream.pop_deferred() is None


def assert_close_in_fp8(rows: fp8.Rows, expected: torch.Tensor) -> None:
    """Each row's scale makes its largest magnitude 448, and every value is the nearest of e4m3's."""
    assert isinstance(rows, fp8.Fp8Rows)
    scale = expected.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    torch.testing.assert_close(rows.scale, scale, atol=0, rtol=1e-4)
    right = (rows.to_float() - expected).abs() <= (expected.abs() / 16).clamp_min(scale / 512) * 1.01
    # Triton's interpreter halves the few values that should round up to a power of two.
    assert right.float().mean() > (0.999 if DEVICE == "cuda" else 0.97)


def test_rows_are_quantized() -> None:
    x = random(6, 72) * torch.tensor([[1e-3], [1.0], [1e3], [0.0], [1.0], [5.0]], device=DEVICE)
    assert_close_in_fp8(fp8.quantized(x), x)
    weight = Fp8Weight.of(x)
    assert_close_in_fp8(fp8.Fp8Rows(weight.values, weight.scale), x)
    assert_close_in_fp8(fp8.quantized_gelu_tanh(x), F.gelu(x, approximate="tanh"))
    gate_up = random(5, 2 * 77)
    assert_close_in_fp8(fp8.quantized_gated_silu(gate_up), F.silu(gate_up[:, :77]) * gate_up[:, 77:])


def test_norms_into_fp8(tables: BatchTables) -> None:
    channels = 40
    shift, weight, bias = random(3, channels)
    x = random(NUM_PATCHES + PADDING, channels)
    x[NUM_PATCHES:] = NAN
    for norm in (
        partial(norms.layer_norm, ResidualStream(x), shift, weight, bias, tables.cu_seqlens),
        partial(norms.rms_norm, ResidualStream(x), shift, weight, tables.cu_seqlens),
    ):
        plain = norm()
        assert isinstance(plain, torch.Tensor)
        assert_close_in_fp8(norm(fp8=True), plain)


def test_window_attention(tables: BatchTables) -> None:
    padded = 32
    q, k = F.pad(random(2, NUM_PATCHES + PADDING, HEADS, HEAD_DIM), (0, padded - HEAD_DIM)).unbind()
    v = random(NUM_PATCHES + PADDING, 3, HEADS, HEAD_DIM)[:, 2]
    v[NUM_PATCHES:] = NAN
    out = kernels.window_attention(q, k, v, tables.window_cu_seqlens, WINDOW**2 * MERGE**2, HEAD_DIM**-0.5)
    for start, stop in zip(tables.window_cu_seqlens[:-1].tolist(), tables.window_cu_seqlens[1:].tolist(), strict=True):
        if start < stop:
            query, key, value = (
                each[start:stop].transpose(0, 1)[None] for each in (q[..., :HEAD_DIM], k[..., :HEAD_DIM], v)
            )
            expected = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
            torch.testing.assert_close(out[start:stop], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("made", "atol"), [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_image_patches(tmp_path: Path, dtype: torch.dtype, made: torch.dtype, atol: float, channels_last: bool) -> None:
    found = settings(tmp_path, "qwen3_vl", QWEN3_IMAGE | {"patch_size": 4, "temporal_patch_size": 3})
    pixels = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = patchify(pixels.expand(3, -1, -1, -1), found)
    given = pixels.to(DEVICE, dtype)
    if dtype.is_floating_point:
        given = given + torch.tensor([0.4, -0.4, 0.0], device=DEVICE).view(3, 1, 1) + 0.0
        given = torch.where(pixels.to(DEVICE) == 255, 290.0, given)
    if channels_last:
        given = given.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mean, std = (torch.tensor(values, device=DEVICE) * 255.0 for values in (found.image_mean, found.image_std))
    sizes = found.patch_size, found.merge_size, found.temporal_patch_size
    patches = kernels.image_patches(given, mean, std, *sizes, made)
    torch.testing.assert_close(patches.cpu(), expected.to(made), atol=atol, rtol=0)
