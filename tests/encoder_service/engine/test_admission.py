"""How much work is admitted, and with which errors the rest is refused."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

import pytest

from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.simulation.costs import MEASURED
from vitrine_vlm.simulation.encoder import EncoderLimits


def test_patches_are_bounded() -> None:
    admission = Admission(CostModel(0.0, 0.0, 0.0), max_patches=100, max_s=math.inf)
    with admission.admit((1, 6, 10)), admission.admit((1, 4, 10)):
        assert admission.num_patches == 100
        with pytest.raises(Overloaded, match="100 patches are queued and 1 more"), admission.admit((1, 1, 1)):
            pass
    with admission.admit((1, 20, 50)):  # without other work it is admitted, as it never would be later either
        assert admission.num_patches == 1000
    assert admission.num_patches == 0


def test_64_pictures_of_1080p_are_admitted_by_default() -> None:
    """As many as a client may well have in flight on its only encoder: Qwen3-VL's are 68 x 120 patches."""
    config = EncoderConfig.from_command_line(["--model", "m"])
    admission = Admission(MEASURED.tower_cost(), max_patches=config.max_queued_patches, max_s=config.max_queued_s)
    with ExitStack() as in_work:
        for _ in range(64):
            in_work.enter_context(admission.admit((1, 68, 120)))
    assert EncoderLimits().max_queued_patches == config.max_queued_patches


def test_seconds_are_bounded_and_a_refusal_says_when_to_retry() -> None:
    admission = Admission(CostModel(0.0, 0.01, 0.0), max_patches=10_000, max_s=5.0)
    with admission.admit((1, 20, 20)):  # 4 s
        assert admission.seconds == pytest.approx(4.0)
        with pytest.raises(Overloaded, match=r"4\.0 s of work are queued") as refused, admission.admit((1, 20, 10)):
            pass
        assert refused.value.retry_after_s == pytest.approx(1.0)
        with admission.admit((1, 10, 10)):
            assert admission.seconds == pytest.approx(5.0)
    assert admission.seconds == 0.0
    with admission.admit((1, 100, 100)):  # alone it may be larger than any bound
        assert admission.seconds == pytest.approx(100.0)


def test_what_cannot_be_done_in_time_is_refused_while_there_is_other_work() -> None:
    admission = Admission(CostModel(0.0, 0.1, 0.0), max_patches=1000, max_s=math.inf)
    soon = time.monotonic() + 3
    with admission.admit((1, 4, 6), soon):  # 2.4 s
        with pytest.raises(Overloaded, match=r"2\.4 s of work are queued") as refused, admission.admit((1, 4, 4), soon):
            pass
        assert refused.value.retry_after_s == pytest.approx(2.4)
        with admission.admit((1, 4, 4), soon + 2):
            pass
    with admission.admit((1, 8, 8), soon):  # 6.4 s, but the model may be wrong and nothing else is lost
        pass


def test_preprocessing_counts_beside_the_tower() -> None:
    admission = Admission(CostModel(0.0, 0.01, 0.0), max_patches=10_000, max_s=5.0)
    with admission.admit((1, 10, 10), preprocess_s=4.0) as large:  # 1 s of the tower
        assert admission.tower_s == pytest.approx(1.0)
        assert admission.seconds == pytest.approx(4.0)
        with (
            pytest.raises(Overloaded, match=r"4\.0 s of work are queued and 2 s more"),
            admission.admit((1, 10, 10), preprocess_s=2.0),
        ):
            pass
        soon = time.monotonic() + 4.5
        with pytest.raises(Overloaded, match="its request ends in"), admission.admit((1, 4, 4), soon, preprocess_s=0.9):
            pass
        with admission.admit((1, 10, 30), soon):  # the tower does it while the other's pixels are decoded
            assert admission.seconds == pytest.approx(4.0)
            large.end_preprocessing()
            assert admission.seconds == pytest.approx(4.0)
        assert admission.seconds == pytest.approx(1.0)
    assert (admission.seconds, admission.preprocess_s) == (0.0, 0.0)


def test_a_provisional_cost_model_refuses_nothing_while_the_queue_is_short() -> None:
    grid = (1, 10, 10)  # 10 s by measurements of a busy machine, 0.5 s in truth
    cost = CostModel(0.0, 0.1, 0.0, provisional_batches=1)
    now = 0.0
    admission = Admission(cost, max_patches=1000, max_s=30.0, clock=lambda: now)
    with ExitStack() as items:
        for _ in range(5):
            items.enter_context(admission.admit(grid, now + 5.0))
        assert admission.seconds == pytest.approx(50.0)
        now += 1.5  # nothing has ended meanwhile: it may be true
        with pytest.raises(Overloaded, match=r"50\.0 s of work are queued"), admission.admit(grid):
            pass
        cost.observe([grid], 0.5)
        assert admission.seconds == pytest.approx(2.5)  # for the items in work, too
        items.enter_context(admission.admit(grid, now + 5.0))
        with pytest.raises(Overloaded, match="600 patches are queued"), admission.admit((1, 30, 30)):
            pass
        now += 60.0
        items.enter_context(admission.admit(grid))
