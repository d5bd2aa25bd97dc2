"""What a process that serves does about its memory."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging

_log = logging.getLogger(__name__)
# From glibc's malloc.h: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 1024 * 1024


def reuse_message_memory() -> None:
    """Has blocks of up to 4 MiB, which messages are, used again instead of going back to the system after each use.

    Pages that come back are faulted in one by one, which takes longer than filling them does (docs/transports.md).
    Keeps up to 256 MiB that are free. glibc only; elsewhere nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt: memory of messages is taken anew for each")
        return
    mallopt(_M_MMAP_THRESHOLD, 4 * _MIB)
    mallopt(_M_TRIM_THRESHOLD, 256 * _MIB)
    mallopt(_M_TOP_PAD, 64 * _MIB)


def freeze_gc() -> None:
    """Has garbage collection pass over everything there is now; for when a service is about to serve.

    The objects of the libraries are hundreds of thousands: a full collection that visits them stops all for 0.2 s.
    """
    gc.collect()
    gc.freeze()
    # At the end they are collected as ever: libraries report what is left then as leaks.
    atexit.register(gc.unfreeze)
