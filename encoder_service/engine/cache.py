"""Rows by content: equal items are encoded once, at the same time or later.

    rows(key, make) -> device tier -> host tier -> an equal item in flight -> make()

Rows are kept in the memory they were made in, on a GPU or on the host, least recently used ones leaving first. What
leaves a GPU moves to the host tier. Sizes are those of the rows, deepstack layers included.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import host_rows, own_rows
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeRows:
    """Rows of one item, [num_tokens, row_width], complete; milliseconds that making them took, 0 for kept ones."""

    rows_TW: torch.Tensor
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    forward_ms: float = 0.0


@dataclass
class CacheStats:
    """hits: of kept rows; joined: of an equal item in flight; misses; evictions: rows that left the last tier.

    nbytes: of kept rows by tier, "gpu" and "host".
    """

    hits: int = 0
    joined: int = 0
    misses: int = 0
    evictions: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)


class _Tier:
    """Rows by key, least recently used first, within a number of bytes."""

    def __init__(self, max_nbytes: int) -> None:
        self.nbytes = 0
        self._max_nbytes = max_nbytes
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def get(self, key: bytes) -> torch.Tensor | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def could_hold(self, nbytes: int) -> bool:
        return nbytes <= self._max_nbytes

    def put(self, key: bytes, rows_TW: torch.Tensor) -> list[tuple[bytes, torch.Tensor]]:
        """Keeps rows that it could hold; returns what had to leave."""
        leaving = []
        while self.nbytes + rows_TW.nbytes > self._max_nbytes:
            oldest = self._rows.popitem(last=False)
            self.nbytes -= oldest[1].nbytes
            leaving.append(oldest)
        self._rows[key] = rows_TW
        self.nbytes += rows_TW.nbytes
        return leaving


@dataclass(frozen=True)
class _Copy:
    """Rows to be kept, where they are new, or to be moved to the host."""

    key: bytes
    rows_TW: torch.Tensor
    is_new: bool


class EmbeddingCache:
    """Belongs to one event loop. Rows it hands out are shared: nobody may write to them."""

    def __init__(self, *, gpu_nbytes: int, host_nbytes: int) -> None:
        """
        Args:
            gpu_nbytes, host_nbytes: kept at most in each tier; 0 keeps nothing there.
        """
        self._gpu, self._host = _Tier(gpu_nbytes), _Tier(host_nbytes)
        self._in_flight: dict[bytes, asyncio.Future[MadeRows]] = {}
        self._to_copy: asyncio.Queue[_Copy] = asyncio.Queue()
        self._copying: asyncio.Task[None] | None = None
        self._stats = CacheStats()

    def start(self, supervisor: Supervisor) -> None:
        """Begins to keep rows, in a loop that the supervisor owns."""
        self._supervisor = supervisor
        self._copying = supervisor.start_task("embedding cache", self._copy_rows())

    async def close(self) -> None:
        """Keeps nothing more."""
        if self._copying is not None:
            await self._supervisor.stop(self._copying)

    def stats(self) -> CacheStats:
        return replace(self._stats, nbytes={"gpu": self._gpu.nbytes, "host": self._host.nbytes})

    def knows(self, key: bytes) -> bool:
        """Whether these rows are kept or being made, so that asking for them costs no work."""
        return key in self._gpu or key in self._host or key in self._in_flight

    async def settled(self) -> None:
        """Waits until everything that is about to be kept or moved is where it belongs."""
        await self._to_copy.join()

    async def rows(self, key: bytes, make: Callable[[], Awaitable[MadeRows]]) -> MadeRows:
        """Kept rows, those of an equal item in flight, or what `make` makes.

        If the one who makes them is cancelled or refused, the next one waiting makes them anew; if it fails, all fail
        alike.

        Args:
            key: equal for equal rows, and for nothing else.
        """
        while True:
            kept = self._gpu.get(key)
            kept = kept if kept is not None else self._host.get(key)
            if kept is not None:
                self._stats.hits += 1
                return MadeRows(kept)
            others = self._in_flight.get(key)
            if others is None:
                self._stats.misses += 1
                return await self._make(key, make)
            if others.done():  # and about to be kept
                self._stats.hits += 1
                return MadeRows(others.result().rows_TW)
            self._stats.joined += 1
            try:
                return await asyncio.shield(others)
            except asyncio.CancelledError:
                if is_own_cancellation():  # the maker may be cancelled as well, at the same moment
                    raise

    async def _make(self, key: bytes, make: Callable[[], Awaitable[MadeRows]]) -> MadeRows:
        done = asyncio.get_running_loop().create_future()
        self._in_flight[key] = done
        try:
            made = await make()
        except BaseException as error:
            del self._in_flight[key]
            if isinstance(error, (asyncio.CancelledError, Overloaded)):  # which says nothing of the others' requests
                done.cancel()
            else:
                done.set_exception(error)
                done.exception()  # seen, even if nobody waits
            raise
        done.set_result(made)
        tier = self._gpu if made.rows_TW.is_cuda else self._host
        if tier.could_hold(made.rows_TW.nbytes):
            self._to_copy.put_nowait(_Copy(key, made.rows_TW, is_new=True))
        else:
            del self._in_flight[key]
        return made

    async def _copy_rows(self) -> None:
        while True:
            copy = await self._to_copy.get()
            try:
                await (self._keep if copy.is_new else self._move_to_host)(copy.key, copy.rows_TW)
            except RuntimeError:  # torch's, of a GPU or a host that is full: rows that are not kept are made again
                _log.exception("rows of %d bytes could not be copied, and are not kept", copy.rows_TW.nbytes)
            finally:
                self._to_copy.task_done()
            del copy  # what has been copied is not held until the next one comes

    async def _keep(self, key: bytes, rows_TW: torch.Tensor) -> None:
        try:
            # Rows are a view of their batch's: kept as they are, they would keep all of it.
            own_TW = await asyncio.to_thread(own_rows, rows_TW)
        finally:
            del self._in_flight[key]
        if rows_TW.is_cuda:
            for left_key, left_TW in self._gpu.put(key, own_TW):
                self._to_copy.put_nowait(_Copy(left_key, left_TW, is_new=False))
        else:
            self._stats.evictions += len(self._host.put(key, own_TW))

    async def _move_to_host(self, key: bytes, rows_TW: torch.Tensor) -> None:
        if not self._host.could_hold(rows_TW.nbytes):
            self._stats.evictions += 1
            return
        on_host_TW = await asyncio.to_thread(host_rows, rows_TW)
        if key not in self._gpu and key not in self._host:
            self._stats.evictions += len(self._host.put(key, on_host_TW))
