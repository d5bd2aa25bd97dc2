"""The part of the time in which a tower has computed."""

from __future__ import annotations

import pytest

from vitrine_vlm.encoder_service.engine.tower_load import TowerLoad


def test_the_load_is_that_of_the_last_half_minute() -> None:
    now = 100.0
    load = TowerLoad(lambda: now)
    assert load.value == 0.0
    for _ in range(10):  # since the start 10 s have passed, of them 4 s in batches
        now += 1.0
        load.add(0.4)
    assert load.value == pytest.approx(0.4)
    for _ in range(40):
        now += 1.0
        load.add(0.9)
    assert load.value == pytest.approx(0.9, rel=0.05)
    now += 15.0
    assert load.value == pytest.approx(0.45, rel=0.07)
    now += 30.0
    assert load.value == 0.0


def test_a_batch_that_took_longer_than_the_window_is_no_load_above_one() -> None:
    now = 0.0
    load = TowerLoad(lambda: now)
    now = 100.0
    load.add(60.0)
    assert load.value == 1.0
