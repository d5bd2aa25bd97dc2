"""Rows on the side that ships them, wherever they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import host_rows


class RowSource(ABC):
    """Complete rows: reading them waits for no stream. shape: num_tokens, row_width."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        num_tokens, row_width = self.shape
        return num_tokens * row_width * self.dtype.itemsize

    @abstractmethod
    def copy_to(self, target_TW: torch.Tensor) -> None:
        """Copies all rows: onto a GPU on its current stream, into host memory blocking."""

    @abstractmethod
    def on_host(self) -> torch.Tensor:
        """The rows in host memory, [num_tokens, row_width], contiguous. Blocking."""


class TensorSource(RowSource):
    """Rows that lie in one tensor, on any device."""

    def __init__(self, rows_TW: torch.Tensor) -> None:
        num_tokens, row_width = rows_TW.shape
        super().__init__((num_tokens, row_width), rows_TW.dtype)
        self._rows_TW = rows_TW

    def copy_to(self, target_TW: torch.Tensor) -> None:
        # To the host by way of the pinned copy, which does not wait for the tower's next batch.
        rows_TW = self._rows_TW if target_TW.is_cuda else self.on_host()
        target_TW.copy_(rows_TW, non_blocking=True)

    def on_host(self) -> torch.Tensor:
        return host_rows(self._rows_TW)
