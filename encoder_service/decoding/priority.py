"""The priority of decoders: lower than that of other work while an item takes long, and not after it.

In Linux a priority is that of a thread, not of a process, and an unprivileged process can lower one, but not raise it
again. So a decoder works on a thread that lowers itself for an item which is expected to take long, or that its encoder
lowers once the item in work has taken long, as some libraries hold the interpreter's lock meanwhile; the next item has
another thread, which the decoder's main thread, which is never lowered, starts.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path

from vitrine_vlm.service_runtime.progress import cpu_seconds

# CPU time behind the first look at an item, seconds, and how often it is looked at. A usual picture takes less, however
# long it waits for a core.
_LONG_S, _LOOK_S = 0.25, 0.25
# Where others take all cores, an item that takes long gets a tenth of what each of their threads gets.
NICENESS = 10


class PriorityOfItem:
    """Lowers the threads of a decoder in the middle of an item that takes long. Cheap for one that does not."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.begin(is_light=True)

    def begin(self, is_light: bool) -> None:
        """Begins an item. The decoder itself has a lower priority from the beginning on for one that is not light."""
        self._next_look = time.monotonic() + _LOOK_S if is_light else math.inf
        self._cpu_s: float | None = None  # at the first look

    def seconds_to_look(self) -> float:
        """How long the caller may wait before it calls `look`."""
        return max(0.0, self._next_look - time.monotonic())

    def look(self) -> None:
        """Lowers the decoder if its item takes long, as far as that is known now."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        with suppress(OSError):  # the process has ended
            cpu_s = cpu_seconds(self._pid)
            if self._cpu_s is None:
                self._cpu_s = cpu_s
            elif cpu_s - self._cpu_s >= _LONG_S:
                _lower(self._pid)
                self._next_look = math.inf


def is_lowered() -> bool:
    """Whether the thread that calls this has a lower priority than the main one."""
    return os.getpriority(os.PRIO_PROCESS, 0) > os.getpriority(os.PRIO_PROCESS, os.getpid())


def lower_this_thread() -> None:
    """Lowers the thread that calls this, and those that it starts from then on."""
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS)


def _lower(pid: int) -> None:
    """Lowers all threads of a process but the main one: libraries have their own."""
    niceness = os.getpriority(os.PRIO_PROCESS, pid) + NICENESS
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) != pid:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
