"""The exported pool: one file in a shared-memory folder, its owner's side and its readers' side.

File layout: one probe page that starts with a random nonce, then blocks. A block is a 64-byte header
(magic, lease_id, generation, nbytes; little-endian u64) and the rows right behind it. The owner changes the generation
before it uses a block anew, so a reader that compares the header before and after its copy knows what it copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import struct
from bisect import insort
from dataclasses import dataclass
from pathlib import Path

import torch

from embedding_transport.errors import LeaseExpired, TransportUnavailable

PROBE_NBYTES = 32
HEADER_NBYTES = 64
_PAGE_NBYTES = 4096
_ALIGNMENT = 64
_MAGIC = 0x76697472696E6531
_HEADER = struct.Struct("<QQQQ")
_PREFIX = "vitrine-"
_NAME = re.compile(r"vitrine-[0-9a-f]{32}")


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


class ShmPool:
    """The owner's side. The file lives as long as the pool; a killed owner's file is removed by the next one.

    Args:
        folder: shared-memory folder, e.g. /dev/shm.
        nbytes: bytes for blocks and their headers.

    Raises:
        TransportUnavailable: the folder cannot be written, or has no room.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        _remove_stale_files(folder)
        self.name = _PREFIX + secrets.token_hex(16)
        self.file_nbytes = _PAGE_NBYTES + nbytes
        self.nonce = secrets.token_bytes(PROBE_NBYTES)
        self._path = folder / self.name
        try:
            self._fd, self._memory = self._make_file(folder)
        except OSError as error:
            raise TransportUnavailable(
                f"no pool of {nbytes} bytes in {folder}: {error.strerror}; make it smaller or the folder larger"
            ) from error
        self._memory[:PROBE_NBYTES] = self.nonce
        self._free_list = FreeList(nbytes)
        self._generation = 0
        self.nbytes = nbytes

    def _make_file(self, folder: Path) -> tuple[int, mmap.mmap]:
        """Named only once it is locked and has its size: nobody ever sees a pool without its owner."""
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            # Held for life: whoever can take this lock knows that the owner is dead.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, self.file_nbytes)
            memory = mmap.mmap(fd, self.file_nbytes)
            folder_fd = os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # With a folder descriptor Python calls linkat, which unlike link follows the one in /proc.
                os.link(f"/proc/self/fd/{fd}", self.name, dst_dir_fd=folder_fd)
            finally:
                os.close(folder_fd)
        except OSError:
            os.close(fd)
            raise
        return fd, memory

    @property
    def used_nbytes(self) -> int:
        return self.nbytes - self._free_list.free_nbytes

    def could_hold(self, nbytes: int) -> bool:
        """Whether a block of that many bytes would fit if the pool were empty."""
        return HEADER_NBYTES + _aligned(nbytes) <= self.nbytes

    def allocate(self, nbytes: int, lease_id: int) -> Block | None:
        """A block whose header names `lease_id`, or None while there is no room."""
        start = self._free_list.take(HEADER_NBYTES + nbytes)
        if start is None:
            return None
        self._generation += 1
        header_offset = _PAGE_NBYTES + start
        _HEADER.pack_into(self._memory, header_offset, _MAGIC, lease_id, self._generation, nbytes)
        return Block(header_offset + HEADER_NBYTES, nbytes, self._generation)

    def rows(self, block: Block, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The block as a tensor to write into; [num_tokens, row_width], exactly the block's bytes."""
        assert shape[0] * shape[1] * dtype.itemsize == block.nbytes, "rows do not fill their block"
        flat = torch.frombuffer(self._memory, dtype=dtype, count=shape[0] * shape[1], offset=block.offset)
        return flat.view(shape)

    def free(self, block: Block) -> None:
        """Takes the block back; readers that still copy will find its header cleared."""
        _HEADER.pack_into(self._memory, block.offset - HEADER_NBYTES, 0, 0, 0, 0)
        self._free_list.give_back(block.offset - HEADER_NBYTES - _PAGE_NBYTES, HEADER_NBYTES + block.nbytes)

    def close(self) -> None:
        """Removes the file. Peers that mapped it keep what they mapped."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


class ShmMapping:
    """The readers' side: the pool of another process, mapped privately, so that nothing here can change it.

    Raises:
        TransportUnavailable: a name that is no pool's, no such file, or a file shorter than claimed.
    """

    def __init__(self, folder: Path, name: str, nbytes: int) -> None:
        if not _NAME.fullmatch(name):
            raise TransportUnavailable(f"{name!r} is no name of a shared-memory pool")
        try:
            # O_NONBLOCK: opening a pipe by that name would wait for its writer.
            fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransportUnavailable(
                f"pool {name} is not in {folder}: {error.strerror}; encoder and worker need the same host and folder"
            ) from error
        try:
            file_nbytes = os.fstat(fd).st_size
            if not _PAGE_NBYTES <= nbytes <= file_nbytes:
                raise TransportUnavailable(f"pool {name} is said to have {nbytes} bytes, its file has {file_nbytes}")
            # Private and writable only because torch refuses read-only buffers: a write would stay in this process.
            self._memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self.nbytes = nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise TransportUnavailable(f"{nbytes} bytes at {offset} lie outside the pool of {self.nbytes}")
        return self._memory[offset : offset + nbytes]

    def rows(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Rows at `offset` as a view, [num_tokens, row_width].

        Raises:
            TransportUnavailable: they do not lie inside the pool, or not aligned.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if offset % _ALIGNMENT or offset < _PAGE_NBYTES + HEADER_NBYTES or offset + nbytes > self.nbytes:
            raise TransportUnavailable(f"rows of {nbytes} bytes at {offset} do not lie in the pool of {self.nbytes}")
        return torch.frombuffer(self._memory, dtype=dtype, count=shape[0] * shape[1], offset=offset).view(shape)

    def check(self, offset: int, lease_id: int, generation: int, nbytes: int) -> None:
        """Compares the block's header with the lease.

        Raises:
            LeaseExpired: the owner has taken the block back.
        """
        header = _HEADER.unpack_from(self._memory, offset - HEADER_NBYTES)
        if header != (_MAGIC, lease_id, generation, nbytes):
            raise LeaseExpired(
                f"lease {lease_id} is no longer held: the encoder reclaimed its rows; encode the item again"
            )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _remove_stale_files(folder: Path) -> None:
    """Removes pools whose owner was killed: nobody holds their lock."""
    for path in folder.glob(_PREFIX + "*"):
        if not _NAME.fullmatch(path.name):
            continue  # somebody else's
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
