"""A process and all its descendants, from Linux's /proc: which there are, and their CPU time."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """Returns the pids of all descendants of a process, zombies included."""
    return _descendants(pid, {each: stat[0] for each in _pids() if (stat := _stat(each))})


def cpu_seconds(pid: int) -> float:
    """Returns user and system time so far of the process and its living descendants, seconds."""
    stats = {each: stat for each in _pids() if (stat := _stat(each))}
    tree = _descendants(pid, {each: parent for each, (parent, _) in stats.items()}) | {pid}
    return sum(stats[each][1] for each in tree if each in stats) / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int, parents: dict[int, int]) -> set[int]:
    tree = {pid}
    while children := {each for each, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return tree - {pid}


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
