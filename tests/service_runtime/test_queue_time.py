"""When a queue of work has been done, by what was done so far."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from vitrine_vlm.service_runtime.queue_time import QueueTime


def test_what_waits_takes_as_long_as_what_was_done() -> None:
    queue_time = QueueTime(num_threads=4)
    assert queue_time.seconds(100) == 0.0, "nothing is known yet"
    queue_time.add(10, 2.0)
    assert queue_time.seconds(100) == pytest.approx(5.0)
    for _ in range(50):
        queue_time.add(10, 1.0)
    assert queue_time.seconds(100) == pytest.approx(2.5, rel=1e-3)
    assert queue_time.seconds(10**9) == 60.0


def test_work_that_fails_counts_too() -> None:
    queue_time = QueueTime(num_threads=1)
    with pytest.raises(ValueError, match="wrong"), queue_time.work(1):
        raise ValueError("wrong")
    assert queue_time.seconds(1) > 0


def test_work_that_was_cancelled_does_not_count() -> None:
    queue_time = QueueTime(num_threads=1)
    queue_time.add(10, 1.0)
    with pytest.raises(CancelledError), queue_time.work(10**6):
        raise CancelledError
    assert queue_time.seconds(10) == pytest.approx(1.0)
