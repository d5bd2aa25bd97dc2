"""How the threads of a process that serves share the interpreter."""

from __future__ import annotations

import sys

# A thread that starts work on a GPU gives the interpreter away with each launch, and waits so long to get it back from
# one that computes. With Python's default of 5 ms that is most of the time, and so is it with 0.5.
_SWITCH_INTERVAL_S = 0.00005


def set_switch_interval() -> None:
    """Has a thread that computes give the interpreter to one that waits for it after a twentieth of a millisecond."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
