"""Runs a command and, when it ends or is stopped, ends all its descendants, also those in sessions of their own.

`python -m benchmarks.compare.tree_keeper PARENT_PID GRACE_S PROGRAM ARGUMENTS...`. On SIGTERM, which it also gets when
its parent process has ended, and when the command ends by itself, all descendants get SIGTERM; those that are left
after GRACE_S seconds are killed. Its exit code is the command's: 128 + N if signal N killed it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress

from benchmarks.process_tree import descendants

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_POLL_S = 0.1


def main(parent: int, grace_s: float, command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # descendants whose parents have ended become children of this process
    if os.getppid() != parent:  # the parent ended before the call, so the signal would never be sent
        return 1
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setpgroup=0)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    code = None
    while code is None and not stopped:
        time.sleep(_POLL_S)
        code = _reap(child)
    _signal_all(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while descendants(os.getpid()):
        if time.monotonic() > deadline:
            _signal_all(signal.SIGKILL)
        time.sleep(_POLL_S)
        reaped = _reap(child)
        code = reaped if code is None else code
    return 0 if code is None else code


def _signal_all(number: signal.Signals) -> None:
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def _reap(child: int) -> int | None:
    """Reaps all children that have ended; returns the exit code of `child` if it is among them."""
    code = None
    with suppress(ChildProcessError):  # there are none
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            if pid == child:
                exit_code = os.waitstatus_to_exitcode(status)
                code = exit_code if exit_code >= 0 else 128 - exit_code
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
