from __future__ import annotations

from vitrine_vlm.vllm_connector.stats import Outcome, StatsCollector, merge_reports


def test_a_report_has_what_was_counted_since_the_last_one() -> None:
    stats = StatsCollector()
    assert stats.take_report() is None
    stats.landed("shm", 100, 0.5)
    stats.landed("shm", 50, 0.25)
    stats.count(Outcome.OWN_TOWER)
    stats.landed_nbytes = 150
    first = stats.take_report()
    assert first == {
        "items": {"delivered": 2, "own_tower": 1},
        "nbytes": {"shm": 150},
        "seconds": [0.5, 0.25],
        "landed_nbytes": 150,
    }
    assert stats.take_report() is None
    stats.landed_nbytes = 0
    stats.landed("grpc", 7, 1.0)
    second = stats.take_report()
    assert first is not None and second is not None
    assert merge_reports(first, second) == {
        "items": {"delivered": 3, "own_tower": 1},
        "nbytes": {"shm": 150, "grpc": 7},
        "seconds": [0.5, 0.25, 1.0],
        "landed_nbytes": 0,
    }
    assert first["items"] == {"delivered": 2, "own_tower": 1}, "not changed by it"


def test_memory_that_is_free_again_is_reported() -> None:
    stats = StatsCollector()
    stats.landed_nbytes = 10
    assert stats.take_report() is not None
    stats.landed_nbytes = 0
    report = stats.take_report()
    assert report is not None and report["landed_nbytes"] == 0
