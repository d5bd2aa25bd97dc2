"""CPU time of a process and all its descendants, from Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Returns user and system time so far of the process and its living descendants, seconds."""
    processes = {each: stat for each in _pids() if (stat := _stat(each))}
    tree = {pid}
    while True:
        children = {each for each, (parent, _) in processes.items() if parent in tree} - tree
        if not children:
            return sum(processes[each][1] for each in tree if each in processes) / os.sysconf("SC_CLK_TCK")
        tree |= children


def _pids() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]


def _stat(pid: int) -> tuple[int, int] | None:
    """Returns the parent's pid and the CPU time in clock ticks, or None if the process has ended."""
    try:
        # The name, in parentheses, may hold spaces; proc(5) numbers the fields: 4 ppid, 14 utime, 15 stime.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[11]) + int(fields[12])
