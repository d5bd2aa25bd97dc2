"""Rows on their way from a GPU to the host."""

from __future__ import annotations

import functools

import torch


def host_rows(rows_TW: torch.Tensor) -> torch.Tensor:
    """The rows in host memory, contiguous; themselves if they are there already. Blocking, but for these rows only.

    Args:
        rows_TW: complete: this does not wait for the stream that makes them.
    """
    if rows_TW.device.type == "cpu":
        return rows_TW.contiguous()
    # Pinned memory is kept and used again by torch; from pageable memory the copy would run at a fraction of the speed.
    host = torch.empty(rows_TW.shape, dtype=rows_TW.dtype, pin_memory=True)
    with torch.cuda.stream(_copy_stream(rows_TW.device)):
        host.copy_(rows_TW, non_blocking=True)
        done = torch.cuda.current_stream().record_event()
    done.synchronize()
    return host


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Of its own, so that a copy does not wait for the tower's next batch."""
    return torch.cuda.Stream(device)
