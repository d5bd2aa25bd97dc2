"""What every exported pool is: one probe page that starts with a random nonce, then blocks of rows.

A block is a 64-byte header (magic, lease_id, generation, nbytes; little-endian u64) and the rows right behind it. The
owner changes the generation before it uses a block anew, so a reader that compares the header after its copy knows what
it copied.
"""

from __future__ import annotations

import secrets
import struct
import threading
from abc import ABC, abstractmethod
from bisect import insort
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

# Plain values, as JSON takes them.
PoolSource: TypeAlias = dict[str, str | int]


@dataclass(frozen=True)
class Block:
    """Part of the pool: `offset` is where the rows begin, `nbytes` how long they are; the header lies before it."""

    offset: int
    nbytes: int
    generation: int


class FreeList:
    """First-fit allocation of [0, nbytes), neighbours joined on free. Sizes are rounded up to the alignment."""

    def __init__(self, nbytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # start, length; sorted by start

    def take(self, nbytes: int) -> int | None:
        """Start of a free range of that length, or None."""
        nbytes = _aligned(nbytes)
        for index, (start, length) in enumerate(self._free):
            if length >= nbytes:
                if length == nbytes:
                    del self._free[index]
                else:
                    self._free[index] = (start + nbytes, length - nbytes)
                return start
        return None

    def give_back(self, start: int, nbytes: int) -> None:
        insort(self._free, (start, _aligned(nbytes)))
        joined: list[tuple[int, int]] = []
        for begin, length in self._free:
            if joined and sum(joined[-1]) == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self._free = joined

    @property
    def free_nbytes(self) -> int:
        return sum(length for _, length in self._free)


class ExportPool(ABC):
    """The owner's side. Blocks are taken and given back from any thread.

    transport: how peers reach it; nonce: what its probe page begins with; mapped_nbytes: what a peer maps, probe page,
    blocks and all.

    Args:
        nbytes: bytes for blocks and their headers.
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
    def used_nbytes(self) -> int:
        return self.nbytes - self._free_list.free_nbytes

    def could_hold(self, nbytes: int) -> bool:
        """Whether a block of that many bytes would fit if the pool were empty."""
        return HEADER_NBYTES + _aligned(nbytes) <= self.nbytes

    def allocate(self, nbytes: int, lease_id: int) -> Block | None:
        """A block whose header names `lease_id`, or None while there is no room."""
        with self._lock:
            start = self._free_list.take(HEADER_NBYTES + nbytes)
            if start is None:
                return None
            self._generation += 1
            header_offset = PAGE_NBYTES + start
            self._write_header(header_offset, _packed_header(_MAGIC, lease_id, self._generation, nbytes))
            return Block(header_offset + HEADER_NBYTES, nbytes, self._generation)

    def free(self, block: Block) -> None:
        """Takes the block back; readers that still copy will find its header cleared."""
        header_offset = block.offset - HEADER_NBYTES
        with self._lock:
            self._write_header(header_offset, bytes(HEADER_NBYTES))
            self._free_list.give_back(header_offset - PAGE_NBYTES, HEADER_NBYTES + block.nbytes)

    @abstractmethod
    def write(self, block: Block, rows: RowSource) -> None:
        """Copies rows of exactly the block's bytes into it; blocking. Peers may read them when it returns."""

    @abstractmethod
    def can_follow(self, rows_TW: torch.Tensor) -> bool:
        """Whether `write_behind` can copy rows that lie where these do."""

    @abstractmethod
    def write_behind(self, block: Block, rows_TW: torch.Tensor) -> None:
        """As `write`, behind what the current stream is doing to the rows: peers may read them once that is through."""

    @abstractmethod
    def close(self) -> None:
        """Ends the pool. Peers that mapped it keep what they mapped."""

    @abstractmethod
    def _write_header(self, offset: int, header: bytes) -> None: ...


class PoolMapping(ABC):
    """A reader's side: the pool of another process, of `nbytes` in all."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        """
        Raises:
            TransportUnavailable: not all of it lies in the pool.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise TransportUnavailable(f"{nbytes} bytes at {offset} lie outside the pool of {self.nbytes}")
        return self._bytes(offset, nbytes)

    def rows(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Rows at `offset` as a view, [num_tokens, row_width].

        Raises:
            TransportUnavailable: they do not lie inside the pool, or not aligned.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if offset % _ALIGNMENT or offset < PAGE_NBYTES + HEADER_NBYTES or offset + nbytes > self.nbytes:
            raise TransportUnavailable(f"rows of {nbytes} bytes at {offset} do not lie in the pool of {self.nbytes}")
        return self._view(offset, shape, dtype)

    def queue_header(self, offset: int) -> torch.Tensor | None:
        """For `check`: the header of the block with rows at `offset`, as the current stream will find it.

        None where the host reads the pool by itself.
        """
        return None

    def check(self, offset: int, lease_id: int, generation: int, nbytes: int, seen: torch.Tensor | None = None) -> None:
        """Compares the block's header with the lease: if they agree, whatever was read of the rows before is right.

        Args:
            seen: the header from `queue_header`, whose stream is through; None to read it now.

        Raises:
            LeaseExpired: the owner has taken the block back.
        """
        header = self._bytes(offset - HEADER_NBYTES, HEADER_NBYTES) if seen is None else seen.numpy().tobytes()
        if header != _packed_header(_MAGIC, lease_id, generation, nbytes):
            raise LeaseExpired(f"lease {lease_id} is no longer held: its owner took the rows back; ask for them again")

    @abstractmethod
    def source(self) -> PoolSource:
        """By which another process of this host maps the same pool, see `pool_source.py`."""

    @abstractmethod
    def _bytes(self, offset: int, nbytes: int) -> bytes: ...

    @abstractmethod
    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor: ...


def _packed_header(magic: int, lease_id: int, generation: int, nbytes: int) -> bytes:
    return _HEADER.pack(magic, lease_id, generation, nbytes).ljust(HEADER_NBYTES, b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
