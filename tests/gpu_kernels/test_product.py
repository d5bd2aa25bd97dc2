"""Products with an activation against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
from vitrine_vlm.gpu_kernels import fused_gemm as fused_gemm_module  # noqa: E402
from vitrine_vlm.gpu_kernels import product  # noqa: E402
from vitrine_vlm.gpu_kernels.autotuner import Tuned  # noqa: E402
from vitrine_vlm.gpu_kernels.fused_gemm import (  # noqa: E402
    ALL_TILES,
    Activation,
    GemmWeights,
    Tiles,
    check_fused_gemm,
    fused_gemm,
    fused_gemm_add,
)
from vitrine_vlm.gpu_kernels.gated_silu import gated_silu  # noqa: E402
from vitrine_vlm.gpu_kernels.product import AddedProduct, Product  # noqa: E402

# Inputs and outputs of products that go through `Product`: of Qwen3-VL-8B's tower and decoder, Qwen2.5-VL-7B's tower.
TRUE_SHAPES: list[tuple[int, int, bool, Activation | None]] = [
    (1152, 3456, True, None),
    (1152, 4304, True, "gelu_tanh"),
    (4096, 6144, False, None),
    (4096, 24576, False, "gated_silu"),
    (1280, 6848, True, "gated_silu"),
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation | None
) -> torch.Tensor:
    """In float32."""
    outputs = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if activation == "gelu_tanh":
        return F.gelu(outputs, approximate="tanh")
    if activation == "gated_silu":
        gate, up = outputs.chunk(2, dim=1)
        return F.silu(gate) * up
    return outputs


@pytest.mark.parametrize("width", [77, 1100])
def test_gated_silu(width: int) -> None:
    gate_up = random(5, 2 * width)
    outputs = F.silu(gate_up[:, :width]) * gate_up[:, width:]
    torch.testing.assert_close(gated_silu(gate_up), outputs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gated_silu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(activation: Activation | None, has_bias: bool) -> None:
    x, weight, bias = random(7, 24, seed=1), random(20, 24, seed=2), random(20, seed=3) if has_bias else None
    found = Product(weight, bias, activation)(x)
    torch.testing.assert_close(found, expected(x, weight, bias, activation), atol=1e-4, rtol=1e-4)


def test_added_products() -> None:
    x, weight, to = random(7, 24, seed=1), random(20, 24, seed=2), random(7, 20, seed=3)
    added = to.clone()
    AddedProduct(weight)(added, x)
    torch.testing.assert_close(added, to + expected(x, weight, None, None), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 129, 4100])
@pytest.mark.parametrize("num_inputs", [1152, 4304])
def test_a_fused_gemm_adds(num_inputs: int, num_rows: int) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    x, to = (random(num_rows, width, seed=width, dtype=torch.bfloat16) for width in (num_inputs, 1152))
    weight = (random(1152, num_inputs, seed=2) * 0.02).bfloat16()
    added = to.clone()
    fused_gemm_add(added, x, weight.t())
    torch.testing.assert_close(added.float(), to + expected(x, weight, None, None), atol=3e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 129, 4100])
@pytest.mark.parametrize("shape", TRUE_SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
@pytest.mark.parametrize("tiles", ALL_TILES, ids=str)
def test_fused_gemms(tiles: Tiles, shape: tuple[int, int, bool, Activation | None], num_rows: int) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    num_inputs, num_outputs, has_bias, activation = shape
    x = random(num_rows, num_inputs, seed=1, dtype=torch.bfloat16)
    weight = (random(num_outputs, num_inputs, seed=2) * 0.02).bfloat16()
    bias = random(num_outputs, seed=3, dtype=torch.bfloat16) if has_bias else None
    check_fused_gemm(weight.dtype, weight.device)
    found = fused_gemm(tiles, x, GemmWeights.of(weight, bias, activation))
    assert found.dtype == torch.bfloat16
    outputs = expected(x, weight, bias, activation)
    assert F.cosine_similarity(found.float(), outputs, dim=-1).min() > 0.99999
    torch.testing.assert_close(found.float(), outputs, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [TRUE_SHAPES[1], TRUE_SHAPES[3]], ids=lambda shape: shape[3])
def test_the_fastest_on_this_gpu_is_used(shape: tuple[int, int, bool, Activation | None]) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    num_inputs, num_outputs, has_bias, activation = shape
    weight = (random(num_outputs, num_inputs, seed=2) * 0.02).bfloat16()
    bias = random(num_outputs, dtype=torch.bfloat16) if has_bias else None
    multiply = Product(weight, bias, activation, sizes=(64, 8192))
    assert multiply._tuned.at(8192) is not product._by_cublas, "a Hopper GPU gains by a fused GEMM"
    x = random(8192, num_inputs, seed=1, dtype=torch.bfloat16)
    assert F.cosine_similarity(multiply(x).float(), expected(x, weight, bias, activation), dim=-1).min() > 0.9999


def test_gate_and_up_of_an_epilogues_bias_are_interleaved() -> None:
    weight, bias = random(6, 4), torch.arange(6.0, device=DEVICE)
    assert GemmWeights.of(weight, bias, "gated_silu").epilogue_bias_O.tolist() == [0, 3, 1, 4, 2, 5]  # type: ignore[union-attr]
    assert GemmWeights.of(weight, bias, "gelu_tanh").epilogue_bias_O is bias
    assert GemmWeights.of(weight, None, "gated_silu").epilogue_bias_O is None


def test_epilogues_compile_wherever_their_libraries_are_installed() -> None:
    """Imports quack-kernels and its dependencies from a folder that is not called site-packages."""
    pytest.importorskip("quack.gemm_interface", reason="quack-kernels is not installed")
    fused_gemm_module._quack()
    from quack.epilogue.library import linear_act_mod

    assert linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=True, has_colvec=False).semantic_digest


def test_what_has_no_fused_gemm_is_refused() -> None:
    weight = random(24, 32)
    with pytest.raises((ImportError, ValueError)):
        check_fused_gemm(weight.dtype, weight.device)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight, sizes: Product(weight, None, "gated_silu", sizes),
        lambda weight, sizes: AddedProduct(weight, sizes),
    ],
    ids=["product", "added"],
)
def test_without_fused_gemms_cublas_is_used(
    make: Callable[[torch.Tensor, tuple[int, ...]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS is used on a device that computes nothing, and where autotuning fails, as for want of memory."""
    weight, usual = torch.empty(20, 24, device="meta"), (product._by_cublas, product._add_by_cublas)
    monkeypatch.setattr(product, "check_fused_gemm", lambda *arguments: None)
    monkeypatch.setattr(product, "autotune", failing)
    assert make(weight, (3, 5))._tuned.at(4) in usual
    assert make(weight, ())._tuned.at(4) in usual


def failing(*arguments: object) -> object:
    raise RuntimeError("no memory")


def test_all_implementations_are_measured_at_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[dict[str, object], tuple[int, ...]]] = []

    def noted(what: str, implementations: dict[str, object], work: object, sizes: tuple[int, ...]) -> Tuned[object]:
        measured.append((implementations, sizes))
        return Tuned((), list(implementations.values())[-1:])

    monkeypatch.setattr(product, "check_fused_gemm", lambda *arguments: None)
    monkeypatch.setattr(product, "autotune", noted)
    weight = torch.empty(28, 24, device="meta")
    last: Any = Product(weight, None, None, (3, 5))._tuned.at(4)
    assert last.func is fused_gemm and last.args == ALL_TILES[-1:]
    assert AddedProduct(weight, (3, 6))._tuned.at(4) is fused_gemm_add
    assert [(len(each), sizes) for each, sizes in measured] == [(1 + len(ALL_TILES), (3, 5)), (2, (3, 6))]
