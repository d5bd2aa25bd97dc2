"""Products with an activation against plain torch: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
from gpu_kernels import product  # noqa: E402
from gpu_kernels.gated_silu import gated_silu  # noqa: E402
from gpu_kernels.one_kernel import Activation, check_one_kernel, one_kernel, one_kernel_add  # noqa: E402
from gpu_kernels.product import AddedProduct, Product  # noqa: E402

# Inputs and outputs of Qwen3-VL-8B's products that go through `Product`: of tower and decoder.
TRUE_SHAPES: list[tuple[int, int, bool, Activation | None]] = [
    (1152, 3456, True, None),
    (1152, 4304, True, "gelu_tanh"),
    (4096, 6144, False, None),
    (4096, 24576, False, "gated_silu"),
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
def test_one_kernel_adds(num_inputs: int, num_rows: int) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    x, to = (random(num_rows, width, seed=width, dtype=torch.bfloat16) for width in (num_inputs, 1152))
    weight = (random(1152, num_inputs, seed=2) * 0.02).bfloat16()
    added = to.clone()
    one_kernel_add(added, x, weight.t())
    torch.testing.assert_close(added.float(), to + expected(x, weight, None, None), atol=3e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 129, 4100])
@pytest.mark.parametrize("shape", TRUE_SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def test_one_kernel(shape: tuple[int, int, bool, Activation | None], num_rows: int) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    num_inputs, num_outputs, has_bias, activation = shape
    x = random(num_rows, num_inputs, seed=1, dtype=torch.bfloat16)
    weight = (random(num_outputs, num_inputs, seed=2) * 0.02).bfloat16()
    bias = random(num_outputs, seed=3, dtype=torch.bfloat16) if has_bias else None
    check_one_kernel(activation, has_bias, weight.dtype, weight.device)
    found = one_kernel(x, weight.t(), bias, activation)
    assert found.dtype == torch.bfloat16
    outputs = expected(x, weight, bias, activation)
    assert F.cosine_similarity(found.float(), outputs, dim=-1).min() > 0.99999
    torch.testing.assert_close(found.float(), outputs, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_from_where_it_is_faster_on_one_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    taken: list[int] = []

    def noted(x: torch.Tensor, *others: object) -> torch.Tensor:
        taken.append(len(x))
        return one_kernel(x, *others)  # type: ignore[arg-type]

    weight, bias = random(4304, 1152, dtype=torch.bfloat16), random(4304, dtype=torch.bfloat16)
    by_size = Product(weight, bias, "gelu_tanh")
    rows_from = by_size._one_kernel_from
    assert rows_from < math.inf, "a Hopper GPU gains by it"
    monkeypatch.setattr(product, "one_kernel", noted)
    for num_rows in (int(rows_from) - 1, int(rows_from)):
        by_size(random(num_rows, 1152, dtype=torch.bfloat16))
    assert taken == [rows_from]


def test_what_one_kernel_does_not_do_is_refused() -> None:
    weight = random(24, 32)
    with pytest.raises((ImportError, ValueError)):
        check_one_kernel(None, False, weight.dtype, weight.device)


@pytest.mark.parametrize(
    ("one_kernel_ms", "rows_from"),
    [((2.0, 0.9, 0.9), 2048), ((0.9, 2.0, 0.9), 4096), ((0.9, 0.9, 0.99), math.inf), ((0.5, 0.5, 0.5), 1024)],
)
def test_one_kernel_is_taken_from_where_it_stays_faster(
    monkeypatch: pytest.MonkeyPatch, one_kernel_ms: tuple[float, ...], rows_from: float
) -> None:
    """Measured by made-up times, on a device that computes nothing."""
    times = iter([ms for own in one_kernel_ms for ms in (1.0, own)])

    def next_time(work: Callable[[], object], repeats: int) -> float:
        work()
        return next(times)

    monkeypatch.setattr(product, "graphed_median_ms", next_time)
    monkeypatch.setattr(product, "check_one_kernel", lambda *arguments: None)
    monkeypatch.setattr(product, "one_kernel", product._by_cublas)
    measure = product._rows_for_one_kernel.__wrapped__
    assert measure(torch.Size((20, 24)), True, None, torch.bfloat16, torch.device("meta")) == rows_from


def test_additions_are_measured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 1.0, 0.9])

    def next_time(work: Callable[[], object], repeats: int) -> float:
        work()
        return next(times)

    monkeypatch.setattr(product, "graphed_median_ms", next_time)
    monkeypatch.setattr(product, "check_one_kernel", lambda *arguments: None)
    monkeypatch.setattr(product, "one_kernel_add", product._add_by_cublas)
    measure = product._rows_for_one_kernel_add.__wrapped__
    assert measure(torch.Size((20, 24)), torch.bfloat16, torch.device("meta")) == 16384
