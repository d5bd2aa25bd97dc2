"""Settings of the memory allocator and the garbage collector for service processes."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import logging

from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
# From glibc's malloc.h: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MIB = 1024 * 1024
# The fall from a peak after which memory is returned, and how long after it.
_LEAST_FALL_NBYTES = 128 * _MIB
_SETTLE_S = 2.0


def reuse_message_memory() -> None:
    """Makes malloc reuse blocks of up to 4 MiB, the size of messages, instead of returning them to the system.

    New pages are faulted in one by one, which takes longer than filling them (docs/transports.md). Up to 256 MiB of
    free memory are kept. glibc only; with other C libraries this does nothing.
    """
    _mallopt({_M_MMAP_THRESHOLD: 4 * _MIB, _M_TRIM_THRESHOLD: 256 * _MIB, _M_TOP_PAD: 64 * _MIB})


def reuse_picture_memory() -> None:
    """Likewise blocks of up to 32 MiB, a decoded picture of 8 million pixels; up to 64 MiB are kept, by all threads."""
    _mallopt({_M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 64 * _MIB, _M_ARENA_MAX: 1})


def return_memory_after_peaks(budget: ByteBudget, supervisor: Supervisor) -> None:
    """Returns freed memory to the system once the budget has fallen from a peak.

    Garbage is collected first: an error and the frames of its traceback refer to each other, and keep the messages of
    requests that have failed until a collection, which a service without requests never makes. And malloc keeps what
    gRPC has freed of large messages, in pieces between others: gigabytes, and for good (docs/reliability.md); other C
    libraries than glibc have no function that returns it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad_nbytes: None)
    jobs: set[asyncio.Task[None]] = set()

    async def trim_later() -> None:
        await asyncio.sleep(_SETTLE_S)
        gc.collect()  # what was there at the start is frozen: few objects
        await asyncio.to_thread(trim, 0)

    def start() -> None:
        if not jobs:
            job = supervisor.start_job("memory", trim_later())
            jobs.add(job)
            job.add_done_callback(jobs.discard)

    budget.notify_falls(_LEAST_FALL_NBYTES, start)


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
