"""Executes another program, which gets SIGTERM when its parent process has ended, even by SIGKILL.

Run as a script: `python bound_to_parent.py PARENT_PID PROGRAM ARGUMENTS...`.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; kept across execve, see prctl(2)

if __name__ == "__main__":
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # the parent ended before the call, so the signal would never be sent
            sys.exit(1)
    os.execv(program, [program, *arguments])
