"""Memory that an encoder and one of its decoders share: two slots, each for the pixels of one picture or frame."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

from vitrine_vlm.encoder_service.decoding.media_decoder import Pixels

NUM_SLOTS = 2
# Pages of larger pictures are returned: faulting those in takes little beside decoding them.
_KEPT_NBYTES = 16 * 1024 * 1024


class Arena:
    """A memfd of fixed size, which takes no more memory than was written to it.

    It is sealed: a decoder that has been taken over cannot cut it off under its encoder.
    """

    def __init__(self, fd: int, max_pixels: int) -> None:
        """
        Args:
            fd: of a memfd of `create`; stays the caller's.
            max_pixels: of a picture or frame.
        """
        self._slot_nbytes = _slot_nbytes(max_pixels)
        self._map = mmap.mmap(fd, NUM_SLOTS * self._slot_nbytes)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._used_nbytes = 0

    @staticmethod
    def create(max_pixels: int) -> int:
        """Returns the file descriptor of a new memfd."""
        fd = os.memfd_create("vitrine-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, NUM_SLOTS * _slot_nbytes(max_pixels))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd

    def pixels(self, height: int, width: int, slot: int = 0) -> Pixels:
        """[height, width, 3] in a slot.

        Raises:
            ValueError: more pixels than a slot has, or none.
        """
        nbytes = 3 * height * width
        if not (0 < height <= nbytes <= self._slot_nbytes and width > 0 and 0 <= slot < NUM_SLOTS):
            raise ValueError(f"{width}x{height} pixels do not fit slot {slot} of {self._slot_nbytes} bytes")
        self._used_nbytes = max(self._used_nbytes, nbytes)
        start = slot * self._slot_nbytes
        return self._bytes[start : start + nbytes].reshape(height, width, 3)

    def release(self) -> None:
        """Returns the memory of large pictures to the system; what they held must not be read any more."""
        if self._used_nbytes > _KEPT_NBYTES:
            self._map.madvise(mmap.MADV_REMOVE)
        self._used_nbytes = 0


def _slot_nbytes(max_pixels: int) -> int:
    return -(-3 * max_pixels // mmap.PAGESIZE) * mmap.PAGESIZE
