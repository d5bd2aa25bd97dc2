"""Which encoder an item goes to: by its content, so that equal items meet the same cache, within a bound on load."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

# No encoder takes more than this multiple of the mean load (Mirrokni et al., "Consistent Hashing with Bounded Loads").
_LOAD_BOUND = 1.25


def ranked(key: bytes, loads: Mapping[str, int], avoided: Collection[str] = ()) -> list[str]:
    """Addresses, best first: by rendezvous score, but those with load to spare before the others.

    Args:
        key: of the content.
        loads: items or requests under way by address, not empty.
        avoided: addresses that come last.
    """
    bound = math.ceil(_LOAD_BOUND * (sum(loads.values()) + 1) / len(loads))
    by_score = sorted(loads, key=lambda address: hashlib.sha256(key + address.encode()).digest(), reverse=True)
    return sorted(by_score, key=lambda address: (address in avoided, loads[address] >= bound))
