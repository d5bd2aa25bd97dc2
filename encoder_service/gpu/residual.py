"""The residual stream of a tower.

Biases: the two products of a block that end in the stream leave their biases out. So the stream lacks the sum of all
biases so far, one constant vector for each place where it is read (`shift`), and the norms add it as they read. That
saves reading and writing the stream twice a block.
"""

from __future__ import annotations

import torch


class ResidualStream:
    """x_PC: [P, C]. A product that could not be added to it in place is owed until the next norm, which adds it."""

    def __init__(self, x_PC: torch.Tensor) -> None:
        self.x_PC = x_PC
        self._owed_PC: torch.Tensor | None = None

    def owe(self, product_PC: torch.Tensor) -> None:
        assert self._owed_PC is None
        self._owed_PC = product_PC

    def settle(self) -> torch.Tensor | None:
        """What the caller has to add to `x_PC`; it is owed no more."""
        owed_PC, self._owed_PC = self._owed_PC, None
        return owed_PC

    def value(self, shift_C: torch.Tensor) -> torch.Tensor:
        """[P, C] float32 with everything it lacks here: `shift_C` and what it is owed."""
        value_PC = self.x_PC.float() + shift_C
        return value_PC if self._owed_PC is None else value_PC + self._owed_PC.float()
