"""How the threads of a process that serves share the interpreter."""

from __future__ import annotations

import sys

# Python's default is 5 ms, which adds up: a thread that only starts work on a GPU waits so long for each of its turns.
_SWITCH_INTERVAL_S = 0.0005


def take_short_turns() -> None:
    """Has a thread that computes give the interpreter to one that waits for it after half a millisecond."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
