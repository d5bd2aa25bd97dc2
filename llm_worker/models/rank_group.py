"""The ranks that share one decoder, as the decoder sees them."""

from __future__ import annotations

from typing import Protocol

import torch


class RankGroup(Protocol):
    """rank: ours, of `size`; all ranks make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, which it may overwrite."""
        ...

    def gather_columns(self, x_TV: torch.Tensor) -> torch.Tensor:
        """Every rank's columns side by side, [T, size * V], on every rank."""
        ...


class OneRank:
    """No others: nothing to sum up or to gather."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x_TV: torch.Tensor) -> torch.Tensor:
        return x_TV
