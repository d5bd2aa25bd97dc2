"""Rows of one item, written into a peer's pool in the wake of the forward that makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.embedding_transport.pools.lending import Held


class EarlyWrite:
    """Takes a block and has it written without waiting for anything; then it waits to be taken, or is given back.

    Where that cannot be (no pool, no room, rows elsewhere) nothing is taken: the rows are exported once they are there.

    Args:
        take: a block of the peer's pool for rows like these, or None; from any thread.
        give_back: called on the event loop with a block that nobody took.
    """

    def __init__(self, take: Callable[[torch.Tensor], Held | None], give_back: Callable[[Held], None]) -> None:
        self._take = take
        self._give_back = give_back
        self._held: Held | None = None
        self._in_batch = False
        self._closed = False

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        """Queues the copy behind what the current stream does to the rows; on the thread that launches it."""
        self._in_batch = True
        if not self._closed:
            self._held = self._take(rows_TW)
            if self._held is not None:
                self._held.pool.write_behind(self._held.block, rows_TW)

    def batch_ended(self) -> None:
        """The copy is through, or will never run."""
        self._in_batch = False
        if self._closed:
            self._drop()

    def taken(self) -> Held | None:
        """The block, written, if there is one; the caller's from now on."""
        held, self._held = self._held, None
        return held

    def close(self) -> None:
        """Gives the block back unless it was taken: at once, or when nothing writes to it any more."""
        self._closed = True
        if not self._in_batch:
            self._drop()

    def _drop(self) -> None:
        held = self.taken()
        if held is not None:
            self._give_back(held)
