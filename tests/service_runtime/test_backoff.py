"""Delays between tries: they grow to a maximum, and no two clients draw the same ones."""

from __future__ import annotations

from vitrine_vlm.service_runtime.backoff import Backoff


def test_delays_double_up_to_the_maximum_and_stay_within_their_bounds() -> None:
    for _ in range(100):
        backoff = Backoff(0.1, 1.0)
        for bound_s in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
            assert bound_s / 2 <= backoff.next_s() <= bound_s


def test_after_a_success_they_begin_again() -> None:
    backoff = Backoff(0.1, 1.0)
    for _ in range(5):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_two_clients_do_not_come_back_together() -> None:
    assert len({Backoff(0.1, 1.0).next_s() for _ in range(50)}) > 40
