"""CUDA graphs of work that reads and writes fixed memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Work: TypeAlias = Callable[[], None]
# The function that it returns does the same work.
Capture: TypeAlias = Callable[[Work], Work]


class CudaGraphs:
    """A `Capture`. All graphs share one memory pool, so only one may run at a time.

    Capture the largest work first: smaller graphs then reuse its memory.

    num_graphs: graphs captured so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_graphs = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._free_before = _free_nbytes(device)

    def __call__(self, work: Work) -> Work:
        work()  # compiles kernels and creates communicators, which is not allowed in a capture
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as those that watch collectives, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self.num_graphs += 1
        return graph.replay

    @property
    def nbytes(self) -> int:
        """By how much the device's free memory has shrunk since this was created, for whatever reason."""
        return self._free_before - _free_nbytes(self._device)


def _free_nbytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # as every capture does; this frees no memory of a graph
    return torch.cuda.mem_get_info(device)[0]
