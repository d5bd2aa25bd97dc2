"""The residual stream of a tower.

Biases: the two products of a block that are added to the stream leave their biases out. So the stream lacks the sum of
all biases so far, which is one constant vector for each place where it is read (`shift`), and the norms add it as they
read. That saves reading and writing the stream twice a block.
"""

from __future__ import annotations

import torch


class ResidualStream:
    """x_PC: [P, C]. A product that could not be added to it in place is deferred: the next norm adds it."""

    def __init__(self, x_PC: torch.Tensor) -> None:
        self.x_PC = x_PC
        self._deferred_PC: torch.Tensor | None = None

    def defer(self, product_PC: torch.Tensor) -> None:
        """Leaves the addition of a product to the next norm."""
        assert self._deferred_PC is None
        self._deferred_PC = product_PC

    def pop_deferred(self) -> torch.Tensor | None:
        """The deferred product, which the caller has to add to `x_PC`; None if there is none."""
        deferred_PC, self._deferred_PC = self._deferred_PC, None
        return deferred_PC

    def value(self, shift_C: torch.Tensor) -> torch.Tensor:
        """The stream's true value here, [P, C] float32: with `shift_C` and the deferred product."""
        value_PC = self.x_PC.float() + shift_C
        return value_PC if self._deferred_PC is None else value_PC + self._deferred_PC.float()
