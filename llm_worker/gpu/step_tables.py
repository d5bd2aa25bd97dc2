"""What attention has to know of a step's sequences, on the GPU at fixed addresses, so that graphs can read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm_worker.engine.host_twin import HostTwin
from llm_worker.models.paged_attention import BlockTable, SequenceSlice

KEYS_A_STEP = 64
# Programs that fill a GPU: eight a multiprocessor where they only read, two where they have many tokens to compute.
MAX_PROGRAMS = 1056
_PROGRAMS_OF_LONG_TILES = 264
# More are not worth putting together.
_MAX_SPLITS = 32


def max_splits(num_tiles: int, num_kv_heads: int, tokens_a_tile: int) -> int:
    """Parts that a tile's past may be cut into, so that few tiles fill a GPU, too."""
    programs = MAX_PROGRAMS if tokens_a_tile == 1 else _PROGRAMS_OF_LONG_TILES
    return max(1, min(_MAX_SPLITS, programs // (num_tiles * num_kv_heads)))


class StepTables:
    """
    blocks: int32 [max_num_seqs, max_blocks], a row a sequence: its cache blocks in order.
    tiles: int32 [4, max_tiles], a column a tile: row of `blocks`, first token among the step's, number of tokens,
    position of the first in its sequence.
    counts: int32 [3]: tiles, splits of each one's past, tokens.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        max_tiles: int,
        block_size: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self._blocks = HostTwin((max_num_seqs, max_blocks), torch.int32, device)
        # Tiles and counts side by side: one copy.
        self._tiles = HostTwin((4 * max_tiles + 3,), torch.int32, device)
        self._num_kv_heads = num_kv_heads
        self.blocks = self._blocks.tensor
        self.tiles, self.counts = self._tiles.tensor[:-3].view(4, -1), self._tiles.tensor[-3:]
        # Which version of which sequence's blocks each row has.
        self._written = [-1] * max_num_seqs

    def write(self, sequences: Sequence[SequenceSlice], tokens_a_tile: int, splits_at_most: int) -> None:
        """Tiles of these sequences' tokens, which are the step's first, without gaps.

        Args:
            splits_at_most: of a tile that there is memory for.
        """
        tiles: list[tuple[int, int, int, int]] = []
        for row, (start, length, context_length, _) in enumerate(sequences):
            for offset in range(0, length, tokens_a_tile):
                num_tokens = min(tokens_a_tile, length - offset)
                tiles.append((row, start + offset, num_tokens, context_length - length + offset))
        numbers = self._tiles.begin()
        numbers[:-3].reshape(4, -1)[:, : len(tiles)] = np.array(tiles, dtype=np.int32).T
        # Two steps a split at least: what is short is not worth cutting.
        most = max(sequence.context_length for sequence in sequences) // (2 * KEYS_A_STEP)
        useful = max_splits(len(tiles), self._num_kv_heads, tokens_a_tile)
        numbers[-3:] = (
            len(tiles),
            max(1, min(splits_at_most, most, useful)),
            sum(sequence.length for sequence in sequences),
        )
        self._tiles.send()
        self._write_blocks([sequence.table for sequence in sequences])

    def _write_blocks(self, tables: list[BlockTable]) -> None:
        changed = [row for row, table in enumerate(tables) if table.version != self._written[row]]
        if not changed:
            return
        blocks_NB = self._blocks.begin()
        for row in changed:
            table = tables[row]
            blocks_NB[row, : len(table.blocks)] = table.blocks
            self._written[row] = table.version
        self._blocks.send(*((row, slice(len(tables[row].blocks))) for row in changed))
