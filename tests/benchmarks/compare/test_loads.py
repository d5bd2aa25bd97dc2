"""What is sent: the selections of loads, and their pictures."""

from __future__ import annotations

from collections import Counter

from benchmarks.compare.drawn_pictures import picture_order, pictures_of
from benchmarks.compare.workloads import (
    IN_FLIGHT,
    MAX_TOKENS,
    NUM_PICTURES,
    REPEATED,
    SIZES,
    SWEEP,
    TEN,
    Workload,
    estimated_s,
    full,
    quick,
    selected,
    warm_up,
)


def test_the_selections() -> None:
    for selection in (quick(), selected(), full()):
        names = [each.name for each in selection]
        assert len(set(names)) == len(names)
        assert all(each.num_requests >= each.in_flight for each in selection)
    assert selected()[: len(TEN)] == TEN
    assert set(quick()) < set(selected()) < set(full())


def test_the_default_selection_goes_along_every_axis() -> None:
    sweep = [each for each in selected() if each.name.startswith(SWEEP)]
    assert {each.num_pictures for each in sweep} == set(NUM_PICTURES)
    assert {each.size for each in sweep} == set(SIZES)
    assert {each.in_flight for each in sweep} == set(IN_FLIGHT)
    assert {each.max_tokens for each in sweep} == set(MAX_TOKENS)
    assert {each.repeated for each in sweep} == set(REPEATED)
    assert len(sweep) < len([each for each in full() if each.name.startswith(SWEEP)]) / 5


def test_estimates_and_warm_up() -> None:
    for each in selected():
        assert 0 < estimated_s(each) < 20
        first = warm_up(each)
        assert first.num_requests <= each.in_flight and first.max_tokens <= each.max_tokens
        assert estimated_s(first) < estimated_s(each)


def test_pictures_repeat_only_as_far_as_the_load_says() -> None:
    assert picture_order(4, 0.0, seed=0) == [0, 1, 2, 3]
    order = picture_order(200, 0.5, seed=0)
    assert len(set(order)) == 100 and order == picture_order(200, 0.5, seed=0)
    assert all(number <= max(order[:place], default=-1) + 1 for place, number in enumerate(order))
    assert max(Counter(order).values()) < 20, "some picture is sent again and again"


def test_every_purpose_has_pictures_of_its_own() -> None:
    workload = Workload("some", 20, 2, 1, (64, 48), num_pictures=2)
    first, second = pictures_of(workload, "first"), pictures_of(workload, "second")
    assert [len(jpegs) for jpegs in first] == [2] * 20
    assert len({jpeg for jpegs in (*first, *second) for jpeg in jpegs}) == 80
    assert pictures_of(workload, "first") == first
    assert pictures_of(Workload("text", 2, 1, 1, num_pictures=0), "first") == [(), ()]
