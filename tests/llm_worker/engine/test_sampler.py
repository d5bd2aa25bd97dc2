"""Sampling against direct computations of what each parameter means."""

from __future__ import annotations

import pytest
import torch

from llm_worker.engine.request import SamplingParams
from llm_worker.engine.sampler import sample, token_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
NUM_DRAWS = 20_000


def draw(sampling: SamplingParams) -> torch.Tensor:
    """Relative frequency of each token."""
    generator = torch.Generator().manual_seed(0)
    draws = [sample(LOGITS, sampling, generator) for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(draws), minlength=len(LOGITS)) / NUM_DRAWS


def renormalized(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    probabilities = (LOGITS / temperature).softmax(-1)
    mask = torch.zeros_like(probabilities)
    mask[kept] = 1
    return probabilities * mask / (probabilities * mask).sum()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), renormalized(list(range(6)))),
        (SamplingParams(temperature=2.0), renormalized(list(range(6)), 2.0)),
        (SamplingParams(top_k=2), renormalized([0, 1])),
        (SamplingParams(top_k=100), renormalized(list(range(6)))),
        # The probabilities are .55, .20, .12, .07, .03, .004: the third token is the one that reaches 0.8.
        (SamplingParams(top_p=0.8), renormalized([0, 1, 2])),
        (SamplingParams(top_p=0.1), renormalized([0])),
        (SamplingParams(top_k=3, top_p=0.7), renormalized([0, 1])),
    ],
)
def test_frequencies_are_the_probabilities(sampling: SamplingParams, expected: torch.Tensor) -> None:
    frequencies = draw(sampling)
    assert torch.equal(frequencies > 0, expected > 0) or expected[expected > 0].min() < 1e-2
    assert torch.allclose(frequencies, expected, atol=0.015)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=1e-45), SamplingParams(temperature=1e-320), SamplingParams(top_p=1e-46)],
    ids=["denormal float32", "denormal float64", "top_p"],
)
def test_the_smallest_values_a_request_may_hold_are_greedy(sampling: SamplingParams) -> None:
    assert {sample(100 * LOGITS, sampling, torch.Generator()) for _ in range(20)} == {0}


def test_equal_seeds_draw_equally() -> None:
    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(LOGITS, SamplingParams(top_p=0.95), generator) for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    sampling = SamplingParams(temperature=0.0, top_k=3, top_p=0.5)
    assert {sample(LOGITS, sampling, torch.Generator()) for _ in range(20)} == {0}


def test_logprobs_are_of_the_raw_distribution() -> None:
    expected = LOGITS.log_softmax(-1)
    logprobs = token_logprobs(LOGITS, 3, 2)
    assert logprobs.logprob == pytest.approx(float(expected[3]))
    assert [token_id for token_id, _ in logprobs.top] == [0, 1]
    assert [value for _, value in logprobs.top] == pytest.approx(expected[:2].tolist())
    assert token_logprobs(LOGITS, 3, 0).top == ()
    assert len(token_logprobs(LOGITS, 3, 20).top) == len(LOGITS)
