"""Processes that do nothing, apart from those that wait for a core, as Linux shows both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vitrine_vlm.service_runtime import progress as module
from vitrine_vlm.service_runtime.progress import ProcessStalled, Progress

SPIN = "print(flush=True)\nwhile True: pass"
SLEEP = "import time; print(flush=True); time.sleep(600)"
# A lock that is tried again and again.
TRY = """
import threading
lock = threading.Lock()
lock.acquire()
print(flush=True)
while not lock.acquire(timeout=0.2):
    pass
"""


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.05)


@contextmanager
def running(code: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def look(progress: Progress, num_looks: int) -> int:
    """Looks so often; returns at which look the process had stalled, or 0."""
    progress.begin_wait()
    for number in range(1, num_looks + 1):
        time.sleep(progress.seconds_to_look())
        try:
            progress.look()
        except ProcessStalled as error:
            assert "did nothing for 0.5 s" in str(error)
            return number
    return 0


@pytest.mark.parametrize("code", [SLEEP, TRY])
def test_one_that_sleeps_has_stalled(code: str) -> None:
    with running(code) as pid:
        (progress := Progress(pid)).begin_work(600.0)
        assert look(progress, 300) >= 11  # the first look has nothing to compare with
        assert look(progress, 5) == 0, "each wait counts from its beginning"


def test_one_that_computes_has_not_stalled_until_it_is_stopped() -> None:
    with running(SPIN) as pid:
        (progress := Progress(pid)).begin_work(600.0)
        assert look(progress, 20) == 0
        os.kill(pid, signal.SIGSTOP)
        assert look(progress, 100) >= 11


def test_one_that_waits_for_a_core_has_not_stalled() -> None:
    """It gets three thousandths of the core."""
    core = {min(os.sched_getaffinity(0))}
    with running(SPIN) as busy, running(SPIN) as starved:
        for pid in (busy, starved):
            os.sched_setaffinity(pid, core)
        os.sched_setscheduler(starved, os.SCHED_IDLE, os.sched_param(0))
        (progress := Progress(starved)).begin_work(600.0)
        assert look(progress, 40) == 0


def test_one_that_works_for_too_long_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WALL_PER_CPU_S", 2.0)
    with running(SPIN) as pid:
        (progress := Progress(pid)).begin_work(0.1)
        with pytest.raises(TimeoutError, match="2 s for one of a core"):
            look(progress, 100)


def test_one_that_has_ended_is_not_looked_at() -> None:
    with running(SPIN) as pid:
        (progress := Progress(pid)).begin_work(600.0)
    assert look(progress, 20) == 0
