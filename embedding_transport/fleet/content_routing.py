"""Routes items by content, so that equal items reach the same encoder's cache, within a bound on its load."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# No encoder gets more than this multiple of the mean load (Mirrokni et al., "Consistent Hashing with Bounded Loads").
_LOAD_BOUND = 1.25
# Bytes of SHA-256 that a score is made of.
_HASH_NBYTES = 8
# Odd constants with well-mixed bits (Steele et al., "Fast Splittable Pseudorandom Number Generators").
_FIRST_FACTOR, _SECOND_FACTOR, _SHIFT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(31)
# Candidates that are found one by one, before all are sorted: at most four of five peers are at their bound.
_NUM_FIRST = 8
# Peers that a table has room for at first; where there are more, the room is doubled.
_FIRST_CAPACITY = 16

_Scores: TypeAlias = npt.NDArray[np.uint64]


def load_bound(total_load: int, num_peers: int) -> int:
    """The load from which on a peer gets no further item while another one has less.

    Args:
        total_load: items or requests in flight on all peers.
    """
    return math.ceil(_LOAD_BOUND * (total_load + 1) / num_peers)


def ranked(key: bytes, loads: Mapping[str, int], avoided: Collection[str] = ()) -> list[str]:
    """Sorts addresses, best first: by rendezvous score, with addresses at their load bound behind all others.

    Args:
        key: the content key.
        loads: items or requests in flight by address; not empty.
        avoided: addresses to put last.
    """
    bound = load_bound(sum(loads.values()), len(loads))
    by_score = sorted(loads, key=lambda address: hashlib.sha256(key + address.encode()).digest(), reverse=True)
    return sorted(by_score, key=lambda address: (address in avoided, loads[address] >= bound))


def address_hash(address: str) -> int:
    """The part of an address in its rendezvous scores, for `RendezvousTable`."""
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:_HASH_NBYTES], "little")


class RendezvousTable:
    """Rendezvous hashing over peers that come and go; takes microseconds where there are thousands.

    Peers have indices from 0 on. The order of a key's peers depends on the key and on their addresses alone. Peers that
    come or go move only the keys that are theirs.
    """

    def __init__(self) -> None:
        self._hashes = np.empty(_FIRST_CAPACITY, dtype=np.uint64)  # the first `_num_peers` are in use
        self._num_peers = 0

    def append(self, address_hash: int) -> None:
        """Adds a peer behind all others."""
        if self._num_peers == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
        self._hashes[self._num_peers] = address_hash
        self._num_peers += 1

    def remove(self, index: int) -> None:
        """Removes a peer; the last one gets its index."""
        self._num_peers -= 1
        self._hashes[index] = self._hashes[self._num_peers]

    def choose(
        self, key: bytes, load: Callable[[int], int], bound: int, is_usable: Callable[[int], bool]
    ) -> int | None:
        """The index of the best usable peer whose load is below the bound; where none is, of the best usable one.

        Args:
            load, is_usable: of the peer at an index.

        Returns:
            None where no peer is usable.
        """
        best: int | None = None
        for index in self._in_order(key):
            if not is_usable(index):
                continue
            if load(index) < bound:
                return index
            best = index if best is None else best
        return best

    def _in_order(self, key: bytes) -> Iterator[int]:
        """All indices, the highest score first."""
        scores = self._scores(key)
        num_first = min(_NUM_FIRST, len(scores))
        for _ in range(num_first):
            index = int(scores.argmax())
            yield index
            scores[index] = 0
        rest = np.argsort(scores)[::-1]
        yield from itertools.islice(map(int, rest), len(scores) - num_first)

    def _scores(self, key: bytes) -> _Scores:
        key_hash = np.frombuffer(hashlib.sha256(key).digest()[:_HASH_NBYTES], dtype="<u8")
        scores: _Scores = self._hashes[: self._num_peers] ^ key_hash
        scores *= _FIRST_FACTOR
        scores ^= scores >> _SHIFT
        scores *= _SECOND_FACTOR
        return scores
