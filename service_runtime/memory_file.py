"""Bytes that two processes share, without either holding its interpreter's lock while they are moved."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class MemoryFile:
    """An anonymous file in memory, which is gone once all processes that have it have closed it.

    What another process has written may be shorter than it says, and is read rather than mapped: a mapping could be cut
    off under its reader.
    """

    def __init__(self, fd: int | None = None) -> None:
        """
        Args:
            fd: of such a file, which belongs to this object then; by default a new, empty one is made.
        """
        self.fd = os.memfd_create("vitrine-bytes", os.MFD_CLOEXEC) if fd is None else fd

    @property
    def nbytes(self) -> int:
        return os.fstat(self.fd).st_size

    def append(self, data: bytes) -> tuple[int, int]:
        """Writes these bytes at the end; returns where they begin and end."""
        begin = self.nbytes
        end = begin + len(data)
        left = memoryview(data)
        while left:
            left = left[os.pwrite(self.fd, left, end - len(left)) :]
        return begin, end

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """The bytes from `begin` to `end`, by default all.

        Raises:
            EOFError: the file is shorter.
        """
        nbytes = (self.nbytes if end is None else end) - begin
        data = os.pread(self.fd, nbytes, begin) if 0 <= nbytes <= self.nbytes else b""
        if len(data) != nbytes:
            raise EOFError(f"{nbytes} bytes from {begin} on are not in a memory file of {self.nbytes}")
        return data

    def close(self) -> None:
        """Closes the file; later calls do nothing. Where it is the last that has a large one, this takes a while."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
