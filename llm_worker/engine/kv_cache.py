"""The paged KV cache: its memory, who holds which block, and which computed blocks can be used again.

A full block is known by a hash over everything in front of it and in it (`prefix_hashes.py`). Sequences that begin
alike share such blocks, which nobody writes to any more. A block that nobody holds keeps its content until it is taken.

Shapes: L layers, S slots (num_blocks * block_size), K key/value heads, D head dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from llm_worker.models.config import TextConfig
from llm_worker.models.paged_attention import BlockTable


class KvCache:
    """Keys and values of every layer, [L, 2, S, K, D], in blocks of `block_size` slots.

    num_evicted: blocks that were taken for something else although their content was known, since the start.
    """

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_evicted = 0
        shape = (config.num_hidden_layers, 2, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.layers = torch.zeros(shape, device=device, dtype=dtype)
        self._num_holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        # Blocks nobody holds: those of no use, and those with content, least recently held first.
        self._empty = list(range(num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._empty) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks nobody holds whose content is known."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks with the content of the first of these hashes, up to the first that is not here."""
        blocks: list[int] = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def begin(self, table: BlockTable, matched: Sequence[int], num_tokens: int, num_spare: int = 0) -> bool:
        """Gives an empty table these blocks and room for `num_tokens` in all, if that leaves `num_spare` blocks free.

        Otherwise gives it nothing and returns False.
        """
        assert not table.blocks
        for block in matched:
            self._num_holders[block] += 1
            self._kept.pop(block, None)
        table.blocks.extend(matched)
        needed = self.blocks_for(num_tokens) - len(matched)
        if needed + num_spare > self.num_free:
            self.free(table)
            return False
        table.blocks.extend(self._take() for _ in range(needed))
        table.set_slots(self.block_size)
        return True

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Extends a sequence's blocks to hold `num_tokens`; takes none and returns False where they do not suffice."""
        needed = self.blocks_for(num_tokens) - len(table.blocks)
        if needed > self.num_free:
            return False
        if needed > 0:
            table.blocks.extend(self._take() for _ in range(needed))
            table.set_slots(self.block_size)
        return True

    def keep(self, table: BlockTable, index: int, content_hash: bytes) -> None:
        """Says what the table's block at `index`, which is full and computed, contains."""
        block = table.blocks[index]
        # An equal block may be known already: one of them is enough.
        if content_hash not in self._block_of and block not in self._hash_of:
            self._block_of[content_hash] = block
            self._hash_of[block] = content_hash

    def free(self, table: BlockTable) -> None:
        """Takes all of a sequence's blocks back and empties its table."""
        # Last ones first: the beginning of a prompt is what others have in common, and should be lost last.
        for block in reversed(table.blocks):
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                if block in self._hash_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)
        table.blocks.clear()
        table.set_slots(self.block_size)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
            self.num_evicted += 1
        self._num_holders[block] = 1
        return block
