"""A copy of one item's rows into a peer's pool, queued on the GPU right behind the forward that computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.embedding_transport.pools.lease_manager import PoolBlock


class AsyncPoolWrite:
    """Allocates a block and queues the copy into it without waiting. If the block is not exported, `close` releases it.

    Where no block can be allocated (no pool, no room, rows on another device) nothing is queued: the rows are exported
    once they are complete.

    Args:
        allocate: returns a block of the peer's pool for rows like these, or None; called from any thread.
        release: called on the event loop with a block that was not exported.
    """

    def __init__(
        self, allocate: Callable[[torch.Tensor], PoolBlock | None], release: Callable[[PoolBlock], None]
    ) -> None:
        self._allocate = allocate
        self._release = release
        self._block: PoolBlock | None = None
        self._in_batch = False
        self._closed = False

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        """Queues the copy behind the current stream's work on the rows; on the thread that launches that work."""
        self._in_batch = True
        if not self._closed:
            self._block = self._allocate(rows_TW)
            if self._block is not None:
                self._block.pool.write_async(self._block.block, rows_TW)

    def batch_ended(self) -> None:
        """The copy has completed, or will never run."""
        self._in_batch = False
        if self._closed:
            self._release_block()

    def pop_block(self) -> PoolBlock | None:
        """Returns the written block, if there is one; the caller owns it from now on."""
        block, self._block = self._block, None
        return block

    def close(self) -> None:
        """Releases the block unless `pop_block` returned it: at once, or when the queued copy has ended."""
        self._closed = True
        if not self._in_batch:
            self._release_block()

    def _release_block(self) -> None:
        block = self.pop_block()
        if block is not None:
            self._release(block)
