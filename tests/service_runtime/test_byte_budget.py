from __future__ import annotations

import pytest

from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.byte_budget import ByteBudget


def test_items_share_the_bound() -> None:
    budget = ByteBudget(10)
    with budget.item() as one, budget.item() as other:
        one.reserve(4)
        other.reserve(6)
        for item in (one, other):
            with pytest.raises(Overloaded, match="10 bytes of requests, media and replies are in work and 1 more"):
                item.reserve(1)
        assert budget.reserved_nbytes == 10
    assert budget.reserved_nbytes == 0


def test_a_single_item_may_exceed_the_bound_and_others_are_refused_until_its_end() -> None:
    budget = ByteBudget(10)
    with budget.item() as one:
        one.reserve(8)
        one.reserve(8)
        with budget.item() as other, pytest.raises(Overloaded):
            other.reserve(1)
        assert budget.reserved_nbytes == 16
    with budget.item() as another:
        another.reserve(1)


def test_an_item_that_fails_releases_its_bytes() -> None:
    budget = ByteBudget(10)
    with pytest.raises(ValueError), budget.item() as one:
        one.reserve(8)
        raise ValueError
    assert budget.reserved_nbytes == 0


def test_bytes_are_free_once_their_last_user_has_released_them() -> None:
    budget = ByteBudget(10)
    with budget.item() as one:
        one.reserve(8)
        one.share()
    assert (one.nbytes, budget.reserved_nbytes) == (8, 8)
    one.release()
    assert budget.reserved_nbytes == 0


def test_a_fall_from_a_peak_is_notified_once() -> None:
    budget, falls = ByteBudget(1000), []
    budget.notify_falls(100, lambda: falls.append(budget.reserved_nbytes))
    with budget.item() as lasting:
        lasting.reserve(300)
        with budget.item() as large:
            large.reserve(200)
        assert falls == [], "more than half is left"
        with budget.item() as larger:
            larger.reserve(400)
        assert falls == [300]
        with budget.item() as small:
            small.reserve(50)
    assert falls == [300, 0]
