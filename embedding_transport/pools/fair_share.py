"""How much of a pool one peer may hold while others are connected.

The rule is that of shared buffers in switches, dynamic thresholds: a holder may have at most a multiple of what is left
free. A single busy holder gets two thirds of the pool, two get two fifths each, and a third of it is free for one that
comes. No order of allocations leads to a deadlock: what is refused waits for bytes that the holder itself has.

Source: Choudhury and Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet Switches, 1998.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_SHARE_OF_FREE = 2


def is_within_share(held_nbytes: int, nbytes: int, free_nbytes: int) -> bool:
    """Whether a holder may have `nbytes` more. One that holds nothing may always, so that large items have their turn.

    Args:
        free_nbytes: what is free before.
    """
    return held_nbytes == 0 or held_nbytes + nbytes <= _SHARE_OF_FREE * (free_nbytes - nbytes)


@dataclass(frozen=True)
class Holder:
    """A session and the peer that it is of."""

    peer: str
    session_id: str


class FairShares:
    """Who holds how much of one pool. A peer's sessions share its share; each is bounded among them by the same rule.

    Where only one session is connected it may hold the whole pool.
    """

    def __init__(self) -> None:
        self._sessions: Counter[str] = Counter()
        self._held_by_peer: Counter[str] = Counter()
        self._held_by_session: Counter[str] = Counter()

    def join(self, holder: Holder) -> None:
        self._sessions[holder.peer] += 1

    def leave(self, holder: Holder) -> None:
        """The session has ended. What it holds still counts until it is removed."""
        _subtract(self._sessions, holder.peer, 1)

    def add(self, holder: Holder, nbytes: int) -> None:
        self._held_by_peer[holder.peer] += nbytes
        self._held_by_session[holder.session_id] += nbytes

    def remove(self, holder: Holder, nbytes: int) -> None:
        _subtract(self._held_by_peer, holder.peer, nbytes)
        _subtract(self._held_by_session, holder.session_id, nbytes)

    @property
    def has_several(self) -> bool:
        """Whether more than one session is connected."""
        return self._sessions.total() > 1

    def may_hold(self, holder: Holder, nbytes: int, free_nbytes: int) -> bool:
        """Whether the holder may have `nbytes` more, of which `free_nbytes` are free before."""
        # A Counter does not keep the keys that are only read.
        if len(self._sessions) > 1 and not is_within_share(self._held_by_peer[holder.peer], nbytes, free_nbytes):
            return False
        if self._sessions[holder.peer] <= 1:
            return True
        return is_within_share(self._held_by_session[holder.session_id], nbytes, free_nbytes)


def _subtract(counter: Counter[str], key: str, number: int) -> None:
    counter[key] -= number
    if not counter[key]:
        del counter[key]
