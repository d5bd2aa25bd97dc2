"""The newest token of every request, on the device.

The sampler writes a step's tokens into the pool, and the next step reads its inputs from there, so that it can be
launched before the host knows these tokens.

Shapes: R rows, B sampled sequences.
"""

from __future__ import annotations

import torch


class TokenPool:
    """One row a request. The rows are managed on the engine's thread, their content belongs to the device's stream.

    tokens_R: int64.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.tokens_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._free = list(range(num_rows))[::-1]

    def allocate(self) -> int:
        """Allocates a row for a request; there are as many as the engine can hold requests."""
        return self._free.pop()

    def release(self, row: int) -> None:
        """Frees the row. A step in flight may still write to it, which does no harm: a request reads only what its own
        steps have written, and those come later on the stream."""
        self._free.append(row)

    def write(self, rows_B: torch.Tensor, token_ids_B: torch.Tensor) -> None:
        """Makes these the newest tokens of these rows; both arguments are int64 on the device."""
        self.tokens_R.index_copy_(0, rows_B, token_ids_B)
