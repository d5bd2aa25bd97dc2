"""The decoder's interface to the ranks that share it."""

from __future__ import annotations

from typing import Protocol

import torch


class RankGroup(Protocol):
    """The ranks that share one decoder; all make the same calls in the same order. rank: of this process, of `size`."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of every rank's `x`, which may be overwritten."""
        ...

    def gather_columns(self, x_TV: torch.Tensor) -> torch.Tensor:
        """Returns the concatenated columns of all ranks, [T, size * V], on every rank."""
        ...


class OneRank:
    """A group of one rank, with nothing to sum up or to gather."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x_TV: torch.Tensor) -> torch.Tensor:
        return x_TV
