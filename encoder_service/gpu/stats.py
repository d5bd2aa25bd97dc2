"""Counters of a tower's CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuStats:
    """Counters since the start.

    num_graphs: graphs captured. graph_nbytes: their memory, with pool and buffers.
    num_replayed, num_eager: batches that ran as a graph, and without one.
    num_padding_patches: patches computed only to fill graphs up.
    """

    num_graphs: int
    graph_nbytes: int
    num_replayed: int
    num_eager: int
    num_padding_patches: int
