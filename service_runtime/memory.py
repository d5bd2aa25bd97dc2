"""Settings of the memory allocator and the garbage collector for service processes."""

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
    """Makes malloc reuse blocks of up to 4 MiB, the size of messages, instead of returning them to the system.

    New pages are faulted in one by one, which takes longer than filling them (docs/transports.md). Up to 256 MiB of
    free memory are kept. glibc only; with other C libraries this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt: the memory of messages is not reused")
        return
    mallopt(_M_MMAP_THRESHOLD, 4 * _MIB)
    mallopt(_M_TRIM_THRESHOLD, 256 * _MIB)
    mallopt(_M_TOP_PAD, 64 * _MIB)


def freeze_gc() -> None:
    """Excludes all present objects from garbage collection; call it right before a service starts to serve.

    Libraries have hundreds of thousands of objects: a full collection that visits them stops all threads for 0.2 s.
    """
    gc.collect()
    gc.freeze()
    # At the end they must be collected: libraries report remaining objects as leaks.
    atexit.register(gc.unfreeze)
