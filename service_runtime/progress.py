"""Whether a process that was asked for something still works on it, as Linux shows it.

Its own limit on CPU time ends a process that computes. One that was stopped, or waits for what never comes, takes none:
it is known by neither computing nor waiting for a core, for memory or for a disk.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_LOOK_S = 1.0
_STALLED_LOOKS = 10
# CPU time between two looks: a lock that is tried again and again takes less.
_LEAST_CPU_S = 1e-3
# As /proc shows them: runs or waits for a core, waits for memory or a disk.
_WORKING_STATES = ("R", "D")
# A process that waits for a core is not late, also at a lower priority.
_WALL_PER_CPU_S = 36.0


class ProcessStalled(Exception):
    """A process did nothing for so long that it never will."""

    def __init__(self) -> None:
        super().__init__(f"did nothing for {_STALLED_LOOKS * _LOOK_S:g} s")


class Look(Protocol):
    """Looks at a process from time to time while something is waited for."""

    def seconds_to_look(self) -> float:
        """How long the caller may wait before it calls `look`."""

    def look(self) -> None:
        """Looks, if it is time to."""


class Progress:
    """Looks at a process while something is waited for that it was asked for."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.begin_work(0.0)
        self.begin_wait()

    def begin_work(self, cpu_s: float) -> None:
        """Begins something for which the process may take so much CPU time, with any number of waits."""
        self._late_at = time.monotonic() + _WALL_PER_CPU_S * cpu_s

    def begin_wait(self) -> None:
        """Looks from now on: before, the process may have waited for its caller."""
        self._next_look = time.monotonic() + _LOOK_S
        self._num_idle = 0
        self._cpu_s: float | None = None  # at the last look

    def seconds_to_look(self) -> float:
        """How long the caller may wait before it calls `look`."""
        return max(0.0, min(self._next_look, self._late_at) - time.monotonic())

    def look(self) -> None:
        """
        Raises:
            ProcessStalled: it did nothing at several looks.
            TimeoutError: it works, and has taken longer than one that waits for cores.
        """
        now = time.monotonic()
        if now >= self._late_at:
            raise TimeoutError(f"a process has not answered in time, which is {_WALL_PER_CPU_S:g} s for one of a core")
        if now < self._next_look:
            return
        # Looks are counted, and not the time between them, in which this process may have been stopped itself.
        self._next_look = now + _LOOK_S
        if not self._is_idle():
            self._num_idle = 0
            return
        self._num_idle += 1
        if self._num_idle >= _STALLED_LOOKS:
            raise ProcessStalled

    def _is_idle(self) -> bool:
        """Whether it has done nothing since the last look, and does nothing now."""
        try:
            before, self._cpu_s = self._cpu_s, cpu_seconds(self._pid)
            if before is None or self._cpu_s - before >= _LEAST_CPU_S:
                return False
            return not any(state in _WORKING_STATES for state in _thread_states(self._pid))
        except OSError:  # it has ended, which its connection shows
            return False


def wait_for(fd: int, event: int, progress: Progress, others: Sequence[Look] = ()) -> None:
    """Waits until a connection to a process can be read or written, which it can once the process has ended, too.

    Args:
        event: POLLIN or POLLOUT.
        others: look at the process meanwhile as well.

    Raises:
        ProcessStalled, TimeoutError: see `Progress.look`.
    """
    ready = select.poll()
    ready.register(fd, event)
    progress.begin_wait()
    looking = (progress, *others)
    while not ready.poll(math.ceil(1000 * min(each.seconds_to_look() for each in looking))):
        for each in looking:
            each.look()


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, by its clock (clock_getcpuclockid, as the kernel numbers them)."""
    return time.clock_gettime(~pid << 3 | 2)


def _thread_states(pid: int) -> list[str]:
    """What each thread does, a letter each; see proc(5)."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            # The name of a thread, in parentheses, may have any characters.
            states.append((task / "stat").read_text(errors="replace").rpartition(") ")[2][:1])
    return states
