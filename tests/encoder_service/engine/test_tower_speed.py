"""How many times as long as by the cost model a tower takes."""

from __future__ import annotations

import pytest

from vitrine_vlm.encoder_service.engine.tower_speed import TowerSpeed


def test_the_newest_batch_counts_and_the_one_that_runs() -> None:
    now = 100.0
    speed = TowerSpeed(lambda: now)
    assert speed.slowness(None) is None, "no batch has run"
    assert speed.slowness((0.01, 0.05)) == 1.0
    assert speed.slowness((0.2, 0.05)) == pytest.approx(4.0), "it should have ended long ago"
    speed.add(0.5, 0.05)
    assert speed.slowness(None) == speed.slowness((0.01, 0.05)) == pytest.approx(10.0)
    speed.add(0.04, 0.05)
    assert speed.slowness(None) == 1.0, "faster than expected is not slow"


def test_a_short_batch_and_a_pause_are_no_slow_tower() -> None:
    speed = TowerSpeed(lambda: 0.0)
    speed.add(0.012, 0.0001)
    assert speed.slowness(None) == pytest.approx(1.2)


def test_an_idle_tower_is_not_known_for_long() -> None:
    """Otherwise one that has recovered would get no item, and never show it."""
    now = 100.0
    speed = TowerSpeed(lambda: now)
    speed.add(0.5, 0.05)
    now += 4.9
    assert speed.slowness(None) == pytest.approx(10.0)
    now += 0.2
    assert speed.slowness(None) is None
    assert speed.slowness((0.01, 0.05)) == 1.0
