"""Amounts a minute, by a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from tests.service_runtime.clock import Clock
from vitrine_vlm.service_runtime.token_bucket import TokenBucket


def test_a_minutes_amount_at_once_then_as_fast_as_it_refills() -> None:
    clock = Clock()
    bucket = TokenBucket(30, clock)
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == pytest.approx(2.0)
    clock.now_s += 1.5
    assert bucket.take() == pytest.approx(0.5), "what was refused has taken nothing"
    clock.now_s += 0.5
    assert bucket.take() == 0.0
    clock.now_s += 3600
    assert [bucket.take() for _ in range(31)].count(0.0) == 30, "it holds no more than a minute's amount"


def test_more_than_a_minutes_amount_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = TokenBucket(100, clock)
    assert bucket.take(10) == 0.0
    assert bucket.take(250) == pytest.approx(6.0)
    clock.now_s += 6
    assert bucket.take(250) == 0.0
    assert bucket.take(1) == pytest.approx(151 * 0.6)
    clock.now_s += 90
    assert bucket.take(1) == pytest.approx(0.6)


def test_the_stated_time_is_true_and_the_rate_holds() -> None:
    """Callers that wait as long as stated always get through, by a minute's amount more than the rate."""
    clock, rng = Clock(), random.Random(3)
    bucket = TokenBucket(7_300_000, clock)
    taken, begun_s = 0, clock.now_s
    for _ in range(2000):
        amount = rng.randrange(1, 9_000_000)
        clock.now_s += rng.random()
        wait_s = bucket.take(amount)
        if wait_s:
            assert bucket.take(amount) == pytest.approx(wait_s)
            clock.now_s += wait_s
            assert bucket.take(amount) == 0.0
        taken += amount
    elapsed_minutes = (clock.now_s - begun_s) / 60
    assert taken <= 7_300_000 * (elapsed_minutes + 1) + 9_000_000
