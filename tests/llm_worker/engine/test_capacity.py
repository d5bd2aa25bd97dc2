"""The limit of requests in an engine, and when those that it refuses are to come again."""

from __future__ import annotations

import pytest

from vitrine_vlm.errors import Overloaded
from vitrine_vlm.llm_worker.engine.capacity import Capacity


def refused(capacity: Capacity) -> float:
    with pytest.raises(Overloaded) as caught:
        capacity.acquire()
    return caught.value.retry_after_s


def test_refused_requests_come_again_one_after_the_other() -> None:
    now = [0.0]
    capacity = Capacity(2, lambda: now[0])
    capacity.acquire()
    capacity.acquire()
    assert refused(capacity) == 0, "nothing has ended yet: unknown"
    for _ in range(200):  # one ends every 2 s
        now[0] += 2.0
        capacity.release()
        capacity.acquire()
    assert [round(refused(capacity)) for _ in range(3)] == [2, 4, 6]
    capacity.release()
    capacity.acquire()
    assert 4 < refused(capacity) <= 6, "one of those that were refused has had its turn"
    for _ in range(100):
        last = refused(capacity)
    assert last == 60, "no client is sent away for longer"
