"""Products with weights in FP8 against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
from vitrine_vlm.gpu_kernels import fp8, fp8_product, skinny_gemm  # noqa: E402
from vitrine_vlm.gpu_kernels.autotuner import Tuned  # noqa: E402
from vitrine_vlm.gpu_kernels.fp8_gemm import FEW_ROWS, MANY_ROWS, Tile, fp8_gemm  # noqa: E402
from vitrine_vlm.gpu_kernels.fp8_product import Epilogue, Fp8Product, Gemm, ScaledMm, Skinny, Tiled  # noqa: E402
from vitrine_vlm.gpu_kernels.fp8_weight import FP8, Fp8Weight  # noqa: E402
from vitrine_vlm.gpu_kernels.norms import add_rms_norm  # noqa: E402

# Tiles of float32 rows would not fit a GPU's shared memory, and the interpreter gets bfloat16 wrong.
DTYPE, TOLERANCE = (torch.bfloat16, 2e-2) if DEVICE.type == "cuda" else (torch.float32, 1e-4)
# Triton's interpreter halves the few values that should round up to a power of two.
MIN_COSINE = 0.998 if DEVICE.type == "cuda" else 0.98
# Qwen3-VL-8B's: query/key/value, attention's output, gate and up, down.
TRUE_SHAPES: list[tuple[int, int, Epilogue]] = [
    (4096, 6144, "none"),
    (4096, 4096, "add"),
    (4096, 24576, "gated_silu"),
    (12288, 4096, "add"),
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def weight(layout: str, outputs: int = 256, inputs: int = 384) -> Fp8Weight:
    values = random(outputs, inputs, seed=1) * 0.02
    if layout == "channel":
        return Fp8Weight.of(values)
    grid = values.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = grid.abs().amax((1, 3)) / 448
    return Fp8Weight((grid / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(FP8), scale, (128, 128))


def expected(x: torch.Tensor, by: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.float(), by.dequantized(torch.float32), None if bias is None else bias.float())


def assert_close(found: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.float(), right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["channel", "block"])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_skinny_gemms(num_rows: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(skinny_gemm, "_OUTPUTS_A_PROGRAM", 64)
        monkeypatch.setattr(skinny_gemm, "_INPUTS_A_STEP", 256)
    x, by, bias, to = random(num_rows, 384), weight(layout), random(256), random(num_rows, 256)
    assert_close(skinny_gemm.skinny_linear(x, by, bias), expected(x, by, bias))
    gate, up = expected(x, by).chunk(2, 1)
    assert_close(skinny_gemm.skinny_gated_silu(x, by), F.silu(gate) * up)
    right = to + expected(x, by)
    skinny_gemm.skinny_linear_add(x, by, to)
    assert_close(to, right)


@pytest.mark.parametrize("layout", ["channel", "block"])
@pytest.mark.parametrize("tile", [*FEW_ROWS, *MANY_ROWS], ids=str)
def test_tiles(tile: Tile, layout: str) -> None:
    x, by, bias = random(70, 384, dtype=DTYPE), weight(layout), random(256)
    if tile in MANY_ROWS:
        rows = fp8.quantized(x)
        found = fp8_gemm(tile, rows, by, bias, torch.float32).sum(0)
        assert_close(found, expected(rows.to_float(), by, bias), TOLERANCE)
    else:
        found, right = fp8_gemm(tile, x, by, bias).float().sum(0), expected(x, by, bias)
        if not tile.in_parts:
            assert_close(found, right, TOLERANCE)
        # Two parts in FP8 keep about 8 bits, but for the values that the interpreter halves.
        assert F.cosine_similarity(found, right, dim=1).min() > (0.9999 if DEVICE.type == "cuda" else 0.999)


def test_a_width_that_no_step_divides() -> None:
    x, by = random(20, 208, dtype=DTYPE), weight("channel", 80, 208)
    assert_close(fp8_gemm(FEW_ROWS[0], x, by)[0], expected(x, by), TOLERANCE)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("layout", ["channel", "block"])
def test_products(layout: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_product, "_MOST_FEW_ROWS", 128 if few else 0)
    x, by = random(7, 384, dtype=DTYPE), weight(layout)
    bias, to = random(256, dtype=DTYPE), random(7, 256, dtype=DTYPE)
    product = Fp8Product(by, bias, dtype=DTYPE)
    assert product.takes_fp8(7) is not few
    rows = fp8.quantized(x)
    given, seen = (x, x) if few else (rows, rows.to_float())
    tolerance = TOLERANCE if few else 2e-2  # torch's own product is rounded to bfloat16
    assert_close(product(given), expected(seen, by, bias), tolerance)
    adding = Fp8Product(by, epilogue="add", dtype=DTYPE)
    right = to + expected(seen, by)
    assert_close(sum(adding.add_to(to, given), to), right, tolerance)
    gate, up = expected(seen, by).chunk(2, 1)
    gated = Fp8Product(by, epilogue="gated_silu", dtype=DTYPE)
    inner = gated.gated_silu(given, quantized=False)
    assert isinstance(inner, torch.Tensor)
    assert_close(inner, F.silu(gate) * up, tolerance)
    inner = gated.gated_silu(given, quantized=True)
    assert isinstance(inner, fp8.Fp8Rows)
    assert F.cosine_similarity(inner.to_float(), F.silu(gate) * up, dim=1).min() > MIN_COSINE


def test_a_decoders_norm_into_fp8() -> None:
    x, added, gain = random(5, 96), random(5, 96, seed=1), random(96)
    right = F.rms_norm(x + added, (96,), gain, 1e-6)
    rows = add_rms_norm(x, (added,), gain, 1e-6, fp8=True)
    assert isinstance(rows, fp8.Fp8Rows)
    torch.testing.assert_close(rows.scale[:, 0], right.abs().amax(1) / 448, rtol=1e-4, atol=0)
    assert F.cosine_similarity(rows.to_float(), right, dim=1).min() > MIN_COSINE


def test_what_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[str]] = []

    def noted(what: str, implementations: dict[str, Gemm], work: object, sizes: list[int]) -> Tuned[Gemm]:
        chosen.append(list(implementations))
        return Tuned((), list(implementations.values())[:1])

    monkeypatch.setattr(fp8_product, "autotune", noted)

    def run(gemm: Gemm) -> None:
        if isinstance(gemm, ScaledMm):
            raise RuntimeError("not on this GPU")

    implementations: dict[str, Gemm] = {"torch's": ScaledMm(), "tiles": Tiled(MANY_ROWS[0], True)}
    fp8_product._tuned_part("a product", implementations, lambda size: run, [8])
    assert chosen == [["tiles"]]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channel", "block"])
@pytest.mark.parametrize("shape", TRUE_SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
@pytest.mark.parametrize("num_rows", [1, 4, 8, 20, 32, 128, 2048])
def test_all_implementations_at_true_dims(num_rows: int, shape: tuple[int, int, Epilogue], layout: str) -> None:
    inputs, outputs, _ = shape
    x, by = random(num_rows, inputs, dtype=torch.bfloat16), weight(layout, outputs, inputs)
    rows = fp8.quantized(x)
    gemms: list[Gemm] = [*(Tiled(tile, False) for tile in FEW_ROWS), *(Tiled(tile, True) for tile in MANY_ROWS)]
    gemms += [ScaledMm(), *([Skinny(), Skinny(4)] if num_rows in skinny_gemm.SKINNY_ROWS else [])]
    for gemm in gemms:
        found = gemm.multiply(rows if gemm.takes_fp8 else x, by, None).float()
        right = expected(rows.to_float() if gemm.takes_fp8 else x, by)
        error = (found - right).norm() / right.norm()
        # bfloat16 rounds results by 0.2 %; tensor cores sum FP8 in fewer bits than float32 has.
        assert error < (2e-2 if gemm.takes_fp8 and layout == "channel" else 4e-3), (gemm, error)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channel", "block"])
@pytest.mark.parametrize("shape", TRUE_SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def test_the_fastest_is_used_and_right(shape: tuple[int, int, Epilogue], layout: str) -> None:
    inputs, outputs, epilogue = shape
    sizes = (1, 2, 4, 8, 32, 128, 2048)
    by = weight(layout, outputs, inputs)
    product = Fp8Product(by, None, epilogue, sizes)
    for size in sizes:
        x = random(size, inputs, dtype=torch.bfloat16)
        right = expected(x, by)
        cosine = F.cosine_similarity(product(x).float(), right, dim=1).min()
        assert cosine > 0.999, (size, cosine)
