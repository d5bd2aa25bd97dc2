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
    _mallopt({_M_MMAP_THRESHOLD: 4 * _MIB, _M_TRIM_THRESHOLD: 256 * _MIB, _M_TOP_PAD: 64 * _MIB})


def reuse_picture_memory() -> None:
    """Likewise blocks of up to 32 MiB, a decoded picture of 8 million pixels; up to 64 MiB are kept."""
    _mallopt({_M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 64 * _MIB})


def _mallopt(parameters: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt: freed memory is not reused")
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)


def freeze_gc() -> None:
    """Excludes all present objects from garbage collection; call it right before a service starts to serve.

    Libraries have hundreds of thousands of objects: a full collection that visits them stops all threads for 0.2 s.
    """
    gc.collect()
    gc.freeze()
    # At the end they must be collected: libraries report remaining objects as leaks.
    atexit.register(gc.unfreeze)
