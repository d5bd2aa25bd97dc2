"""Rows by content: equal items are encoded once, at the same time or later.

    get_or_compute(key, compute) -> GPU tier -> host tier -> an equal item in flight -> compute()

Rows are cached in the memory they were computed in, on a GPU or on the host; the least recently used rows are evicted
first. Rows that are evicted from a GPU move to the host tier. Sizes are those of the rows, deepstack layers included.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import clone_rows, copy_to_host
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one item, [num_tokens, row_width], complete, and how they were computed.

    preprocess_ms, queue_ms, forward_ms: time that each stage took, 0 for cached rows.
    """

    rows_TW: torch.Tensor
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    forward_ms: float = 0.0


@dataclass
class CacheStats:
    """Lookups by their result, and what is cached.

    hits: found cached rows; joined: waited for an equal item in flight; misses: found neither. unfinished: of these,
    computations that were cancelled, were refused or failed.
    evictions: rows that left the last tier. nbytes: bytes of cached rows by tier, "gpu" and "host".
    """

    hits: int = 0
    joined: int = 0
    misses: int = 0
    unfinished: int = 0
    evictions: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)


class _Tier:
    """Rows by key, least recently used first, of at most `max_nbytes` bytes."""

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

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self._max_nbytes

    def put(self, key: bytes, rows_TW: torch.Tensor) -> list[tuple[bytes, torch.Tensor]]:
        """Caches rows that fit; returns the rows that were evicted for them."""
        evicted = []
        while self.nbytes + rows_TW.nbytes > self._max_nbytes:
            oldest = self._rows.popitem(last=False)
            self.nbytes -= oldest[1].nbytes
            evicted.append(oldest)
        self._rows[key] = rows_TW
        self.nbytes += rows_TW.nbytes
        return evicted


@dataclass(frozen=True)
class _PendingCopy:
    """Rows that are to be copied into the cache, where `is_new`, or to move from the GPU to the host tier."""

    key: bytes
    rows_TW: torch.Tensor
    is_new: bool


class EmbeddingCache:
    """Belongs to one event loop. The rows that it returns are shared: callers must not write to them."""

    def __init__(self, *, gpu_nbytes: int, host_nbytes: int) -> None:
        """
        Args:
            gpu_nbytes, host_nbytes: bytes of each tier at most; 0 turns the tier off.
        """
        self._gpu, self._host = _Tier(gpu_nbytes), _Tier(host_nbytes)
        self._in_flight: dict[bytes, asyncio.Future[EncodedRows]] = {}
        self._to_copy: asyncio.Queue[_PendingCopy] = asyncio.Queue()
        self._copying: asyncio.Task[None] | None = None
        self._stats = CacheStats()

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loop that copies rows into the cache, which the supervisor owns."""
        self._supervisor = supervisor
        self._copying = supervisor.start_task("embedding cache", self._copy_rows())

    async def close(self) -> None:
        """Stops that loop: no further rows are cached."""
        if self._copying is not None:
            await self._supervisor.stop(self._copying)

    def stats(self) -> CacheStats:
        return replace(self._stats, nbytes={"gpu": self._gpu.nbytes, "host": self._host.nbytes})

    def has(self, key: bytes) -> bool:
        """Whether these rows are cached or in flight, so that asking for them costs no work."""
        return key in self._gpu or key in self._host or key in self._in_flight

    async def flush(self) -> None:
        """Waits for all pending copies."""
        await self._to_copy.join()

    async def get_or_compute(self, key: bytes, compute: Callable[[], Awaitable[EncodedRows]]) -> EncodedRows:
        """Cached rows, those of an equal item in flight, or the result of `compute`.

        If the caller that computes them is cancelled or refused, the next one that waits computes them again; if it
        fails, all that wait fail alike.

        Args:
            key: equal for equal rows, and for nothing else.
        """
        while True:
            cached = self._gpu.get(key)
            cached = cached if cached is not None else self._host.get(key)
            if cached is not None:
                self._stats.hits += 1
                return EncodedRows(cached)
            in_flight = self._in_flight.get(key)
            if in_flight is None:
                self._stats.misses += 1
                return await self._compute(key, compute)
            if in_flight.done():  # and about to be cached
                self._stats.hits += 1
                return EncodedRows(in_flight.result().rows_TW)
            self._stats.joined += 1
            try:
                return await asyncio.shield(in_flight)
            except asyncio.CancelledError:
                if is_own_cancellation():  # the one that computes may be cancelled as well, at the same moment
                    raise

    async def _compute(self, key: bytes, compute: Callable[[], Awaitable[EncodedRows]]) -> EncodedRows:
        done = asyncio.get_running_loop().create_future()
        self._in_flight[key] = done
        try:
            encoded = await compute()
        except BaseException as error:
            self._stats.unfinished += 1
            del self._in_flight[key]
            if isinstance(error, (asyncio.CancelledError, Overloaded)):  # which says nothing of the others' requests
                done.cancel()
            else:
                done.set_exception(error)
                done.exception()  # retrieved, even if no request waits for it
            raise
        done.set_result(encoded)
        tier = self._gpu if encoded.rows_TW.is_cuda else self._host
        if tier.fits(encoded.rows_TW.nbytes):
            self._to_copy.put_nowait(_PendingCopy(key, encoded.rows_TW, is_new=True))
        else:
            del self._in_flight[key]
        return encoded

    async def _copy_rows(self) -> None:
        while True:
            copy = await self._to_copy.get()
            try:
                await (self._store if copy.is_new else self._move_to_host)(copy.key, copy.rows_TW)
            except RuntimeError:  # torch's where memory is full: rows that are not cached are computed again
                _log.exception("rows of %d bytes could not be copied, and are not cached", copy.rows_TW.nbytes)
            finally:
                self._to_copy.task_done()
            del copy  # or these rows would stay in memory until the next copy

    async def _store(self, key: bytes, rows_TW: torch.Tensor) -> None:
        try:
            # Rows are a view of their batch's rows: cached as they are, they would keep the whole batch in memory.
            own_TW = await asyncio.to_thread(clone_rows, rows_TW)
        finally:
            del self._in_flight[key]
        if rows_TW.is_cuda:
            for evicted_key, evicted_TW in self._gpu.put(key, own_TW):
                self._to_copy.put_nowait(_PendingCopy(evicted_key, evicted_TW, is_new=False))
        else:
            self._stats.evictions += len(self._host.put(key, own_TW))

    async def _move_to_host(self, key: bytes, rows_TW: torch.Tensor) -> None:
        if not self._host.fits(rows_TW.nbytes):
            self._stats.evictions += 1
            return
        on_host_TW = await asyncio.to_thread(copy_to_host, rows_TW)
        if key not in self._gpu and key not in self._host:
            self._stats.evictions += len(self._host.put(key, on_host_TW))
