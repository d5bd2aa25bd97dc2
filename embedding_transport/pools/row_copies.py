"""Blocking copies of rows on a stream of their own, which do not wait for other work on the GPU."""

from __future__ import annotations

import contextlib
import functools

import torch


def copy_to_host(rows_TW: torch.Tensor) -> torch.Tensor:
    """Returns the rows in host memory, contiguous; without a copy if they lie there already. Blocks.

    Args:
        rows_TW: complete rows: the copy does not wait for the stream that computes them.
    """
    if rows_TW.device.type == "cpu":
        return rows_TW.contiguous()
    # torch caches pinned memory; a copy into pageable memory would run at a fraction of the speed.
    host = torch.empty(rows_TW.shape, dtype=rows_TW.dtype, pin_memory=True)
    with on_copy_stream(rows_TW.device):
        host.copy_(rows_TW, non_blocking=True)
        done = torch.cuda.current_stream().record_event()
    done.synchronize()
    return host


def clone_rows(rows_TW: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy on the same device. Blocks; `rows_TW` must be complete, as for `copy_to_host`."""
    if not rows_TW.is_cuda:
        return rows_TW.clone(memory_format=torch.contiguous_format)
    with on_copy_stream(rows_TW.device):
        own = rows_TW.clone(memory_format=torch.contiguous_format)
        done = torch.cuda.current_stream().record_event()
    done.synchronize()
    return own


def on_copy_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device's copy stream the current one inside the context; does nothing for the CPU."""
    return torch.cuda.stream(_copy_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the device's copy stream, whose copies do not wait for the tower's next batch or its large kernels."""
    return torch.cuda.Stream(device, priority=-1)
