"""Embeddings in a tensor of this process: the smallest real EmbeddingRows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.types import ItemTimings


class TensorRows:
    """[num_tokens, row_width]; `error` is raised by their check where set, and nothing is copied."""

    def __init__(self, rows_TW: torch.Tensor, error: Exception | None = None) -> None:
        self.num_tokens = len(rows_TW)
        self.timings = ItemTimings()
        self.num_releases = 0
        self._rows_TW = rows_TW
        self._error = error

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        assert not self.num_releases
        if self._error is not None:
            return
        part, hidden = self._rows_TW[first_row : first_row + len(main_TD)], main_TD.shape[1]
        main_TD.copy_(part[:, :hidden])
        for layer, target in enumerate(deepstack_NTD if deepstack_NTD is not None else []):
            target.copy_(part[:, hidden * (1 + layer) : hidden * (2 + layer)])

    def queue_check(self) -> Callable[[], None]:
        return self.check

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def release(self) -> None:
        self.num_releases += 1
