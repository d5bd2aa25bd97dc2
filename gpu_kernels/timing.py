"""Measures time on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs of `work` on the current stream, by events; warm it up first."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(start.elapsed_time(end) for start, end in marks)
    return times[repeats // 2]


def graphed_median_ms(work: Callable[[], object], repeats: int) -> float:
    """`median_ms` of `work` as a CUDA graph, as launches from Python would measure the host's speed."""
    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return median_ms(graph.replay, repeats)
