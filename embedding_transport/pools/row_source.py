"""Rows on the side that ships them, independent of where they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import copy_to_host


class RowSource(ABC):
    """Complete rows, whose reads wait for no stream. `shape` is (num_tokens, row_width)."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        num_tokens, row_width = self.shape
        return num_tokens * row_width * self.dtype.itemsize

    @abstractmethod
    def copy_to(self, target_TW: torch.Tensor) -> None:
        """Copies all rows: to a GPU on its current stream, to host memory blocking."""

    @abstractmethod
    def on_host(self) -> torch.Tensor:
        """Returns the rows in host memory, [num_tokens, row_width], contiguous. Blocks."""


class TensorSource(RowSource):
    """Rows that lie in one tensor, on any device."""

    def __init__(self, rows_TW: torch.Tensor) -> None:
        num_tokens, row_width = rows_TW.shape
        super().__init__((num_tokens, row_width), rows_TW.dtype)
        self._rows_TW = rows_TW

    def copy_to(self, target_TW: torch.Tensor) -> None:
        # A copy to the host goes through pinned memory, which does not wait for the tower's next batch.
        rows_TW = self._rows_TW if target_TW.is_cuda else self.on_host()
        target_TW.copy_(rows_TW, non_blocking=True)

    def on_host(self) -> torch.Tensor:
        return copy_to_host(self._rows_TW)
