"""The paged KV cache: its memory, and which blocks are free.

Shapes: L layers, S slots (num_blocks * block_size), K key/value heads, D head dim.
"""

from __future__ import annotations

import torch

from llm_worker.models.config import TextConfig


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

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extends a sequence's blocks to hold `num_tokens`; takes none and returns False where they do not suffice."""
        needed = self.blocks_for(num_tokens) - len(blocks)
        if needed > len(self._free):
            return False
        for _ in range(needed):
            blocks.append(self._free.pop())
        return True

    def free(self, blocks: list[int]) -> None:
        """Takes all of a sequence's blocks back and empties its list."""
        self._free.extend(blocks)
        blocks.clear()

    def slots(self, blocks: list[int], num_tokens: int) -> torch.Tensor:
        """Cache slot of each of a sequence's first tokens, [num_tokens] int64, on the cache's device."""
        offsets = torch.arange(self.block_size)
        slots = (torch.tensor(blocks)[:, None] * self.block_size + offsets).flatten()[:num_tokens]
        return slots.to(self.layers.device)
