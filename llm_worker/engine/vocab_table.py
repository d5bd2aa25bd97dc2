"""Numbers for every token of the vocabulary, on the device, for the requests that need them.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch


class VocabTable:
    """One row a request. Memory is allocated when a row is first needed, and doubled when there are too few.

    Rows are managed on the engine's thread, their content belongs to the device's stream: a step in flight may still
    write to a row that is released, and its next request overwrites the row later on the stream.

    rows_RV: replaced when the table grows.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows_RV = torch.zeros((0, vocab_size), dtype=dtype, device=device)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []

    def __contains__(self, key: int) -> bool:
        return key in self._row_of

    def __len__(self) -> int:
        """The number of requests that have a row."""
        return len(self._row_of)

    def row_of(self, key: int) -> int:
        """The row of the request with this key."""
        return self._row_of[key]

    def allocate(self, key: int) -> torch.Tensor:
        """Returns the request's row, a new one unless it has one already; the caller overwrites its content, [V]."""
        if key not in self._row_of:
            if not self._free:
                self._grow()
            self._row_of[key] = self._free.pop()
        return self.rows_RV[self._row_of[key]]

    def release(self, key: int) -> None:
        """Frees the request's row, if it has one."""
        row = self._row_of.pop(key, None)
        if row is not None:
            self._free.append(row)

    def _grow(self) -> None:
        num_rows = len(self.rows_RV)
        num_new = max(num_rows, 1)
        self.rows_RV = torch.cat([self.rows_RV, self.rows_RV.new_empty((num_new, self.rows_RV.shape[1]))])
        self._free.extend(range(num_rows, num_rows + num_new))
