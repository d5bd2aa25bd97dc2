"""The paged KV cache: its memory, the sequences that use each block, and the computed blocks that can be used again.

A full block is identified by a hash over everything in front of it and in it (`prefix_hashes.py`). Sequences with the
same beginning share such blocks, which are not written to any more. A block without users keeps its content until it
is allocated again.

Shapes: L layers, S slots (num_blocks * block_size), K key/value heads, D head dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from vitrine_vlm.llm_worker.engine.prefix_index import PrefixIndex
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable


class KvCache:
    """Keys and values of every layer, [L, 2, S, K, D], in blocks of `block_size` slots.

    num_evicted: registered blocks that were allocated for other content, since the start.
    """

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_evicted = 0
        shape = (config.num_hidden_layers, 2, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.layers = torch.zeros(shape, device=device, dtype=dtype)
        self._ref_counts = [0] * num_blocks
        self._prefixes = PrefixIndex()
        # Blocks without users: those that are not registered, and the cached ones, least recently used first.
        self._empty = list(range(num_blocks))
        self._cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.layers[:, :, 0].nbytes

    @property
    def num_free(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._empty) + len(self._cached_free)

    @property
    def num_cached_free(self) -> int:
        """Registered blocks that no sequence uses."""
        return len(self._cached_free)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks with the content of the first hashes, up to one that is not registered. Safe on any thread."""
        return self._prefixes.match(hashes)

    def allocate(self, table: BlockTable, matched: Sequence[int], num_tokens: int, num_reserved: int = 0) -> bool:
        """Fills an empty table with the matched blocks and as many more as `num_tokens` tokens need in all.

        Returns False, and allocates nothing, if that would leave fewer than `num_reserved` blocks free.
        """
        assert not table.blocks
        for block in matched:
            self._ref_counts[block] += 1
            self._cached_free.pop(block, None)
        table.blocks.extend(matched)
        needed = self.blocks_for(num_tokens) - len(matched)
        if needed + num_reserved > self.num_free:
            self.release(table)
            return False
        table.blocks.extend(self._allocate_blocks(needed))
        table.set_slots(self.block_size)
        return True

    def append_slots(self, table: BlockTable, num_tokens: int) -> bool:
        """Extends a table to hold `num_tokens` tokens; returns False, and allocates nothing, if there are too few."""
        needed = self.blocks_for(num_tokens) - len(table.blocks)
        if needed > self.num_free:
            return False
        if needed > 0:
            table.blocks.extend(self._allocate_blocks(needed))
            table.set_slots(self.block_size)
        return True

    def register_hash(self, table: BlockTable, index: int, content_hash: bytes) -> None:
        """Registers the table's block at `index`, which is full and computed, under the hash of its content."""
        self._prefixes.register(table.blocks[index], content_hash)

    def reset_prefixes(self) -> None:
        """Unregisters all blocks: none of their content is used again by later sequences."""
        self._prefixes.clear()
        self._empty.extend(self._cached_free)
        self._cached_free.clear()

    def release(self, table: BlockTable) -> None:
        """Releases all of a table's blocks and empties the table."""
        # Last ones first: other prompts share the beginning, which should be evicted last.
        registered, ref_counts = self._prefixes.blocks, self._ref_counts
        for block in reversed(table.blocks):
            ref_counts[block] -= 1
            if not ref_counts[block]:
                if block in registered:
                    self._cached_free[block] = None
                else:
                    self._empty.append(block)
        table.blocks.clear()
        table.set_slots(self.block_size)

    def _allocate_blocks(self, number: int) -> list[int]:
        first_empty = max(0, len(self._empty) - number)
        blocks = self._empty[first_empty:]
        blocks.reverse()  # the last one released is the first one used again
        del self._empty[first_empty:]
        while len(blocks) < number:
            block, _ = self._cached_free.popitem(last=False)
            self._prefixes.discard(block)
            self.num_evicted += 1
            blocks.append(block)
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks
