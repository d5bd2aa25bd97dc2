"""The paged KV cache: its memory, and which blocks are free.

Shapes: L layers, S slots (num_blocks * block_size), K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llm_worker.models.config import TextConfig


@dataclass(eq=False)
class BlockTable:
    """The blocks one sequence holds.

    slots: cache slot of each token they have room for, in order, [len(blocks) * block_size] int64, where the cache is.
    """

    blocks: list[int] = field(default_factory=list)
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class KvCache:
    """Keys and values of every layer, [L, 2, S, K, D], and a free list of blocks of `block_size` slots."""

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (config.num_hidden_layers, 2, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.layers = torch.zeros(shape, device=device, dtype=dtype)
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Extends a sequence's blocks to hold `num_tokens`; takes none and returns False where they do not suffice."""
        needed = self.blocks_for(num_tokens) - len(table.blocks)
        if needed > len(self._free):
            return False
        if needed > 0:
            table.blocks.extend(self._free.pop() for _ in range(needed))
            self._set_slots(table)
        return True

    def free(self, table: BlockTable) -> None:
        """Takes all of a sequence's blocks back and empties its table."""
        self._free.extend(table.blocks)
        table.blocks.clear()
        self._set_slots(table)

    def _set_slots(self, table: BlockTable) -> None:
        first_slots = torch.tensor(table.blocks, dtype=torch.int64)[:, None] * self.block_size
        table.slots = (first_slots + torch.arange(self.block_size)).flatten().to(self.layers.device)
