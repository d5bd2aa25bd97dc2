"""Routes items by content, so that equal items reach the same encoder's cache, within a bound on its load."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

# No encoder gets more than this multiple of the mean load (Mirrokni et al., "Consistent Hashing with Bounded Loads").
_LOAD_BOUND = 1.25


def ranked(key: bytes, loads: Mapping[str, int], avoided: Collection[str] = ()) -> list[str]:
    """Sorts addresses, best first: by rendezvous score, with addresses at their load bound behind all others.

    Args:
        key: the content key.
        loads: items or requests in flight by address; not empty.
        avoided: addresses to put last.
    """
    bound = math.ceil(_LOAD_BOUND * (sum(loads.values()) + 1) / len(loads))
    by_score = sorted(loads, key=lambda address: hashlib.sha256(key + address.encode()).digest(), reverse=True)
    return sorted(by_score, key=lambda address: (address in avoided, loads[address] >= bound))
