"""Sampling against direct computations of what each parameter means."""

from __future__ import annotations

import pytest
import torch

from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.sampler import choose

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
NUM_DRAWS = 20_000


def draws(logits_V: torch.Tensor, sampling: SamplingParams, count: int, seed: int = 0) -> list[int]:
    """Tokens drawn in one batch."""
    drawn = choose(logits_V.expand(count, -1), [sampling] * count, uniform(count, seed)).copy_to_host().read()
    return [each.token_id for each in drawn if each.token_id is not None]


def uniform(count: int, seed: int = 0) -> list[float]:
    numbers: list[float] = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers


def draw(sampling: SamplingParams) -> torch.Tensor:
    """Relative frequency of each token."""
    drawn = draws(LOGITS, sampling, NUM_DRAWS)
    return torch.bincount(torch.tensor(drawn), minlength=len(LOGITS)) / NUM_DRAWS


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
    assert set(draws(100 * LOGITS, sampling, 20)) == {0}


def test_equal_numbers_draw_equally_in_any_batch() -> None:
    sampling = SamplingParams(top_p=0.95)
    alone = draws(LOGITS, sampling, 50, seed=1)
    assert alone == draws(LOGITS, sampling, 50, seed=1) != draws(LOGITS, sampling, 50, seed=2)
    others = [SamplingParams(top_k=2), sampling, SamplingParams(temperature=0.0), SamplingParams(temperature=9.0)]
    logits_BV = torch.stack([LOGITS.flip(0), LOGITS, LOGITS, 3 * LOGITS])
    beside = []
    for own, *of_others in zip(uniform(50, 1), *(uniform(50, seed) for seed in (2, 3, 4)), strict=True):
        numbers = [of_others[0], own, *of_others[1:]]
        beside.append(choose(logits_BV, others, numbers).copy_to_host().read()[1].token_id)
    assert beside == alone


def test_temperature_zero_is_greedy_whatever_the_other_parameters() -> None:
    assert set(draws(LOGITS, SamplingParams(temperature=0.0, top_k=3, top_p=0.5), 20)) == {0}


def test_the_last_of_the_kept_tokens_is_never_passed() -> None:
    """Equal masses add up with errors; none may lead to a token that top-p has cut."""
    logits_V = torch.zeros(50_000)
    sampling = SamplingParams(top_p=0.5)
    drawn = draws(logits_V, sampling, 64)
    kept = logits_V.sort(descending=True).indices[:25_001].tolist()
    assert set(drawn) <= set(kept)


def test_nan_logits_are_not_drawn_from_and_do_not_affect_the_others() -> None:
    logits_BV = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS])
    choice = choose(logits_BV, [SamplingParams(top_k=1)] * 3, uniform(3))
    # The next step may read it before its request has failed.
    assert 0 <= choice.token_ids_B[1] < len(LOGITS)
    first, broken, last = choice.copy_to_host().read()
    assert (first.token_id, broken.token_id, last.token_id) == (0, None, 0)


def test_logprobs_are_of_the_raw_distribution() -> None:
    expected = LOGITS.log_softmax(-1)
    params = [SamplingParams(temperature=0.0, logprobs=count) for count in (2, 0, 20, None)]
    two, none, all_of_them, not_asked = (
        each.logprobs for each in choose(LOGITS.expand(4, -1), params, uniform(4)).copy_to_host().read()
    )
    assert two is not None and none is not None and all_of_them is not None and not_asked is None
    assert two.token_id == 0 and two.logprob == pytest.approx(float(expected[0]))
    assert [token_id for token_id, _ in two.top] == [0, 1]
    assert [value for _, value in two.top] == pytest.approx(expected[:2].tolist())
    assert none.top == ()
    assert len(all_of_them.top) == len(LOGITS)
    (drawn,) = (
        choose(LOGITS[None], [SamplingParams(temperature=5.0, top_p=0.9, logprobs=1)], uniform(1)).copy_to_host().read()
    )
    assert drawn.logprobs is not None and drawn.token_id is not None
    assert drawn.logprobs.logprob == pytest.approx(float(expected[drawn.token_id]))
