"""What the CUDA graphs of a tower did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuStats:
    """num_graphs, graph_nbytes: captured, with pool and buffers; the rest counts since the start."""

    num_graphs: int
    graph_nbytes: int
    num_replayed: int
    num_eager: int
    num_padding_patches: int
