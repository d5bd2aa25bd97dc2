"""The exported pool as a file in a shared-memory folder: the owner's side and the readers' side."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import re
import secrets
from pathlib import Path

import torch

from vitrine_vlm.embedding_transport.pools.pool import (
    PAGE_NBYTES,
    PROBE_NBYTES,
    Block,
    ExportPool,
    PoolMapping,
    PoolSource,
)
from vitrine_vlm.embedding_transport.pools.row_source import RowSource, TensorSource
from vitrine_vlm.errors import TransportUnavailable

_log = logging.getLogger(__name__)

_PREFIX = "vitrine-"
_NAME = re.compile(r"vitrine-[0-9a-f]{32}")


class ShmPool(ExportPool):
    """The owner's side. The file exists as long as the pool; the next pool removes the file of a killed owner.

    Args:
        folder: shared-memory folder, e.g. /dev/shm.
        nbytes: the bytes for blocks and their headers.

    Raises:
        TransportUnavailable: the folder is not writable, or has no room.
    """

    transport = "shm"

    def __init__(self, folder: Path, nbytes: int) -> None:
        super().__init__(nbytes)
        remove_stale_pools(folder)
        self.name = _PREFIX + secrets.token_hex(16)
        self._path = folder / self.name
        try:
            self._fd, self._memory = self._make_file(folder)
        except OSError as error:
            raise TransportUnavailable(
                f"no pool of {nbytes} bytes in {folder}: {error.strerror}; make it smaller or the folder larger"
            ) from error
        self._memory[:PROBE_NBYTES] = self.nonce

    def _make_file(self, folder: Path) -> tuple[int, mmap.mmap]:
        """Links the file only once it is locked and has its size, so that a pool without an owner is never visible."""
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            # Held as long as the process runs: if another process can take this lock, the owner is dead.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, self.mapped_nbytes)
            memory = mmap.mmap(fd, self.mapped_nbytes)
            folder_fd = os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # With a folder descriptor Python calls linkat, which, unlike link, follows the symbolic link in /proc.
                os.link(f"/proc/self/fd/{fd}", self.name, dst_dir_fd=folder_fd)
            finally:
                os.close(folder_fd)
        except OSError:
            os.close(fd)
            raise
        return fd, memory

    def rows(self, block: Block, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Returns the block as a writable tensor, [num_tokens, row_width], of exactly the block's size."""
        assert shape[0] * shape[1] * dtype.itemsize == block.nbytes, "rows do not fill their block"
        flat = torch.frombuffer(self._memory, dtype=dtype, count=shape[0] * shape[1], offset=block.offset)
        return flat.view(shape)

    def write(self, block: Block, rows: RowSource) -> None:
        rows.copy_to(self.rows(block, rows.shape, rows.dtype))

    def supports_device(self, device: torch.device) -> bool:
        """Only the CPU: a GPU does not write this memory itself."""
        return device.type == "cpu"

    def write_async(self, block: Block, rows_TW: torch.Tensor) -> None:
        self.write(block, TensorSource(rows_TW))

    def close(self) -> None:
        """Removes the file. Mappings that peers have made stay valid."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _write_header(self, offset: int, header: bytes) -> None:
        self._memory[offset : offset + len(header)] = header


class ShmMapping(PoolMapping):
    """The readers' side: the pool of another process, mapped privately, so that this process cannot change it.

    Raises:
        TransportUnavailable: the name is not that of a pool, the file does not exist, or it is shorter than `nbytes`.
    """

    def __init__(self, folder: Path, name: str, nbytes: int) -> None:
        super().__init__(nbytes)
        self._folder, self._name = folder, name
        if not _NAME.fullmatch(name):
            raise TransportUnavailable(f"{name!r} is not the name of a shared-memory pool")
        try:
            # O_NONBLOCK: opening a named pipe would otherwise wait for its writer.
            fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransportUnavailable(
                f"pool {name} is not in {folder}: {error.strerror}; both sides need the same host and folder"
            ) from error
        try:
            file_nbytes = os.fstat(fd).st_size
            if not PAGE_NBYTES <= nbytes <= file_nbytes:
                raise TransportUnavailable(f"pool {name} is said to have {nbytes} bytes, its file has {file_nbytes}")
            # Writable because torch refuses read-only buffers; private, so that a write would stay in this process.
            self._memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)

    def source(self) -> PoolSource:
        return {"folder": str(self._folder), "name": self._name, "nbytes": self.nbytes}

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        return self._memory[offset : offset + nbytes]

    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._memory, dtype=dtype, count=shape[0] * shape[1], offset=offset).view(shape)


def remove_stale_pools(folder: Path) -> None:
    """Removes pools whose owner was killed: their lock is free.

    Every service does this at its start, also one that makes no pool: the memory is the host's, and no owner may come.
    """
    for path in folder.glob(_PREFIX + "*"):
        if not _NAME.fullmatch(path.name):
            continue  # another program's file
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                _log.info("removed the pool %s, whose owner was killed", path)
            finally:
                os.close(fd)
