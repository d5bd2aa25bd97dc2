"""The interpreter's thread switch interval in service processes."""

from __future__ import annotations

import sys

# A thread that launches work on a GPU releases the interpreter lock with each launch, and waits this long to acquire it
# again from a thread that computes. With Python's default of 5 ms, or with 0.5 ms, it would wait most of the time.
_SWITCH_INTERVAL_S = 0.00005


def set_switch_interval() -> None:
    """Makes a thread that computes release the interpreter lock to a waiting thread after 0.05 ms."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
