"""An index of the KV cache's blocks by the hash of their content (`prefix_hashes.py`)."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable


class PrefixIndex:
    """Full, computed blocks by the hash of their content. Safe on any thread.

    The engine's thread registers and discards blocks; other threads only look prompts up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def blocks(self) -> Collection[int]:
        """The registered blocks."""
        return self._hash_of.keys()

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks with the content of the first of these hashes, up to the first hash that is not registered."""
        blocks: list[int] = []
        with self._lock:
            for each in hashes:
                block = self._block_of.get(each)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def register(self, block: int, content_hash: bytes) -> None:
        """Registers the block under its content's hash, unless a block of equal content is registered."""
        with self._lock:
            if content_hash not in self._block_of and block not in self._hash_of:
                self._block_of[content_hash] = block
                self._hash_of[block] = content_hash

    def clear(self) -> None:
        """Removes all blocks."""
        with self._lock:
            self._block_of.clear()
            self._hash_of.clear()

    def discard(self, block: int) -> None:
        """Removes a registered block, which is about to be overwritten."""
        with self._lock:
            del self._block_of[self._hash_of.pop(block)]
