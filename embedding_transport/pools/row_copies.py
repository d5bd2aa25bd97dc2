"""Copies of rows that are complete when they are handed out, and that wait for nothing but themselves."""

from __future__ import annotations

import contextlib
import functools

import torch


def host_rows(rows_TW: torch.Tensor) -> torch.Tensor:
    """The rows in host memory, contiguous; themselves if they are there already. Blocking.

    Args:
        rows_TW: complete: this does not wait for the stream that makes them.
    """
    if rows_TW.device.type == "cpu":
        return rows_TW.contiguous()
    # Pinned memory is kept and used again by torch; from pageable memory the copy would run at a fraction of the speed.
    host = torch.empty(rows_TW.shape, dtype=rows_TW.dtype, pin_memory=True)
    with on_copy_stream(rows_TW.device):
        host.copy_(rows_TW, non_blocking=True)
        done = torch.cuda.current_stream().record_event()
    done.synchronize()
    return host


def own_rows(rows_TW: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the same device, in memory of its own. Blocking; `rows_TW` as of `host_rows`."""
    if rows_TW.device.type == "cpu":
        return rows_TW.clone(memory_format=torch.contiguous_format)
    with on_copy_stream(rows_TW.device):
        own = rows_TW.clone(memory_format=torch.contiguous_format)
        done = torch.cuda.current_stream().record_event()
    done.synchronize()
    return own


def on_copy_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What is launched inside on a GPU runs beside the work of others; on the CPU it changes nothing."""
    return torch.cuda.stream(_copy_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Of its own, so that a copy does not wait for the tower's next batch."""
    return torch.cuda.Stream(device)
