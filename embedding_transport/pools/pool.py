"""The layout of every exported pool: one probe page that starts with a random nonce, then blocks of rows.

A block is a 64-byte header (magic, lease_id, generation, nbytes; little-endian u64) and the rows right behind it. The
owner changes the generation before it uses a block again, so a reader that compares the header after its copy can tell
whether the copy is valid.
"""

from __future__ import annotations

import secrets
import struct
import threading
from abc import ABC, abstractmethod
from bisect import bisect
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.errors import LeaseExpired, TransportUnavailable

PROBE_NBYTES = 32
HEADER_NBYTES = 64
PAGE_NBYTES = 4096
_ALIGNMENT = 64
_MAGIC = 0x76697472696E6531
_HEADER = struct.Struct("<QQQQ")

# Values that JSON can hold.
PoolSource: TypeAlias = dict[str, str | int]


@dataclass(frozen=True)
class Block:
    """A part of the pool: the rows begin at `offset` and have `nbytes` bytes; the header lies right before `offset`."""

    offset: int
    nbytes: int
    generation: int


class FreeList:
    """First-fit allocation of [0, nbytes). Adjacent free ranges are joined; sizes are rounded up to the alignment."""

    def __init__(self, nbytes: int) -> None:
        self.free_nbytes = nbytes
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # start, length; sorted by start

    def allocate(self, nbytes: int) -> int | None:
        """Returns the start of a range of that length, or None if no free range is long enough."""
        nbytes = _aligned(nbytes)
        for index, (start, length) in enumerate(self._free):
            if length >= nbytes:
                if length == nbytes:
                    del self._free[index]
                else:
                    self._free[index] = (start + nbytes, length - nbytes)
                self.free_nbytes -= nbytes
                return start
        return None

    def release(self, start: int, nbytes: int) -> None:
        length = _aligned(nbytes)
        self.free_nbytes += length
        index = bisect(self._free, (start, 0))
        if index < len(self._free) and start + length == self._free[index][0]:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            length += before
        self._free.insert(index, (start, length))


class ExportPool(ABC):
    """The owner's side of a pool. Blocks are allocated and released from any thread.

    transport: the name of the transport by which peers read the pool.
    nonce: the random bytes at the beginning of the probe page.
    mapped_nbytes: the size of the whole mapping, probe page included.

    Args:
        nbytes: the bytes for blocks and their headers.
    """

    transport: str

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.mapped_nbytes = PAGE_NBYTES + nbytes
        self.nonce = secrets.token_bytes(PROBE_NBYTES)
        self._free_list = FreeList(nbytes)
        self._generation = 0
        self._lock = threading.Lock()

    @property
    def free_nbytes(self) -> int:
        return self._free_list.free_nbytes

    @property
    def used_nbytes(self) -> int:
        return self.nbytes - self.free_nbytes

    def could_hold(self, nbytes: int) -> bool:
        """Whether a block of that many bytes fits the empty pool."""
        return HEADER_NBYTES + _aligned(nbytes) <= self.nbytes

    def allocate(self, nbytes: int, lease_id: int) -> Block | None:
        """Returns a block whose header names `lease_id`, or None while there is no room."""
        with self._lock:
            start = self._free_list.allocate(HEADER_NBYTES + nbytes)
            if start is None:
                return None
            self._generation += 1
            header_offset = PAGE_NBYTES + start
            self._write_header(header_offset, _packed_header(_MAGIC, lease_id, self._generation, nbytes))
            return Block(header_offset + HEADER_NBYTES, nbytes, self._generation)

    def release(self, block: Block) -> None:
        """Releases the block and clears its header, so that a reader that still copies notices it."""
        header_offset = block.offset - HEADER_NBYTES
        with self._lock:
            self._write_header(header_offset, bytes(HEADER_NBYTES))
            self._free_list.release(header_offset - PAGE_NBYTES, HEADER_NBYTES + block.nbytes)

    @abstractmethod
    def write(self, block: Block, rows: RowSource) -> None:
        """Copies rows of exactly the block's size into it. Blocks until peers may read them."""

    @abstractmethod
    def supports_device(self, device: torch.device) -> bool:
        """Whether `write_async` can copy rows from this device."""

    @abstractmethod
    def write_async(self, block: Block, rows_TW: torch.Tensor) -> None:
        """Queues the copy on the current stream, behind its work on the rows. Peers may read them after the copy."""

    @abstractmethod
    def close(self) -> None:
        """Closes the pool. Mappings that peers have made stay valid."""

    @abstractmethod
    def _write_header(self, offset: int, header: bytes) -> None: ...


class PoolMapping(ABC):
    """A reader's side: the mapped pool of another process, of `nbytes` bytes in all."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns a copy of these bytes of the pool.

        Raises:
            TransportUnavailable: they do not lie inside the pool.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise TransportUnavailable(f"{nbytes} bytes at {offset} lie outside the pool of {self.nbytes}")
        return self._bytes(offset, nbytes)

    def read_probe(self, offset: int, nbytes: int) -> bytes:
        """Returns what an offer says to be the nonce.

        Raises:
            TransportUnavailable: it is no part of the probe page. Another part is not read for a peer: it may have
                offered a pool that is not its own.
        """
        if not 1 <= nbytes <= PROBE_NBYTES or not 0 <= offset <= PAGE_NBYTES - nbytes:
            raise TransportUnavailable(
                f"a probe of {nbytes} bytes at {offset}: expected at most {PROBE_NBYTES}, in the page"
            )
        return self.read(offset, nbytes)

    def rows(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Returns a view of the rows at `offset`, [num_tokens, row_width].

        Raises:
            TransportUnavailable: there are none, they do not lie inside the pool, or are not aligned.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if (
            min(shape) < 1
            or offset % _ALIGNMENT
            or offset < PAGE_NBYTES + HEADER_NBYTES
            or offset + nbytes > self.nbytes
        ):
            raise TransportUnavailable(f"rows of {nbytes} bytes at {offset} do not lie in the pool of {self.nbytes}")
        return self._view(offset, shape, dtype)

    def queue_header(self, offset: int) -> torch.Tensor | None:
        """Queues a copy of the header of the block at `offset` on the current stream, for `check`.

        Returns None where the host can read the pool itself.
        """
        return None

    def check(
        self, offset: int, lease_id: int, generation: int, nbytes: int, header: torch.Tensor | None = None
    ) -> None:
        """Compares the block's header with the lease: if they agree, all rows that were read before are valid.

        Args:
            header: the result of `queue_header`, once its stream has copied it; None to read the header now.

        Raises:
            LeaseExpired: the owner has released the block.
        """
        found = self._bytes(offset - HEADER_NBYTES, HEADER_NBYTES) if header is None else header.numpy().tobytes()
        if found != _packed_header(_MAGIC, lease_id, generation, nbytes):
            raise LeaseExpired(f"lease {lease_id} is no longer held: its owner released the rows; request them again")

    @abstractmethod
    def source(self) -> PoolSource:
        """Returns what another process of this host needs to map the same pool, see `pool_source.py`."""

    @abstractmethod
    def _bytes(self, offset: int, nbytes: int) -> bytes: ...

    @abstractmethod
    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor: ...


def _packed_header(magic: int, lease_id: int, generation: int, nbytes: int) -> bytes:
    return _HEADER.pack(magic, lease_id, generation, nbytes).ljust(HEADER_NBYTES, b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
