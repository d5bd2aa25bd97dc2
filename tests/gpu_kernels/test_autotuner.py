"""The choice between implementations, by made-up times."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from vitrine_vlm.gpu_kernels import autotuner
from vitrine_vlm.gpu_kernels.autotuner import Tuned, autotune


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were measured; each piece of work returns its own milliseconds."""
    sizes: list[int] = []
    monkeypatch.setattr(autotuner, "graphed_median_ms", lambda work, repeats: work())
    return sizes


def choose(measured: list[int], sizes: list[int], slim_ms: Callable[[int], float] = lambda size: 1.0) -> Tuned[str]:
    def work(size: int) -> Callable[[str], float]:
        measured.append(size)
        ms = {"usual": 1.0, "slim": slim_ms(size), "never": 2.0}
        return lambda name: ms[name]

    return autotune("work", {name: name for name in ("usual", "slim", "never")}, work, sizes)


def test_each_size_has_its_own(measured: list[int]) -> None:
    tuned = choose(measured, [64, 128, 192], lambda size: 0.5 if size == 128 else 1.5)
    assert [tuned.at(size) for size in (1, 64, 65, 128, 129, 192)] == ["usual"] * 2 + ["slim"] * 2 + ["usual"] * 2


@pytest.mark.parametrize(("ms", "chosen"), [(0.99, "usual"), (0.97, "slim")])
def test_a_gain_within_noise_is_ignored(measured: list[int], ms: float, chosen: str) -> None:
    assert choose(measured, [64], lambda size: ms).at(64) == chosen


def test_above_the_largest_size_its_choice_is_used(measured: list[int]) -> None:
    assert choose(measured, [64, 128], lambda size: 0.5 if size == 128 else 1.5).at(1 << 20) == "slim"


def test_large_sizes_have_one_measurement_together(measured: list[int]) -> None:
    tuned = choose(measured, [8000, 8192, 8200, 12000, 45056], lambda size: 0.5 if size > 8192 else 1.5)
    assert measured == [8000, 8192, 16384]
    assert [tuned.at(size) for size in (8192, 8200, 45056)] == ["usual", "slim", "slim"]
    measured.clear()
    choose(measured, [8192, 10000])
    assert measured == [8192, 10000]


def test_the_log_says_what_was_chosen(measured: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose(measured, [64, 128, 192], lambda size: 0.5 if size != 128 else 1.5)
    assert "of 3 sizes 2 by slim, 1 by usual; the largest by usual 1.000 ms, slim 0.500 ms" in caplog.text


def test_a_single_implementation_needs_no_sizes() -> None:
    assert Tuned((), ["only"]).at(5) == "only"
