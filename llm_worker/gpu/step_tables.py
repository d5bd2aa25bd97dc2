"""Tables of a step's sequences for attention, on the GPU at fixed addresses, so that graphs can read them.

The unit of work is a tile: a few consecutive tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vitrine_vlm.llm_worker.engine.staging_buffer import PinnedStagingBuffer
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice

KEYS_A_STEP = 64
# More splits take longer to combine than they save.
MAX_SPLITS = 32
# Programs that fill a GPU: eight a multiprocessor where they mostly read, two where they compute many tokens.
MAX_PROGRAMS = 1056
_PROGRAMS_OF_LONG_TILES = 264


class Tiles:
    """Tiles of at most `tokens_a_tile` tokens each.

    tiles: int32 [4, max_tiles], a column a tile: its row of the block table, its first token in the step, its number of
    tokens, and the position of its first token in the sequence. counts: int32 [2]: tiles, and splits of each past.
    """

    def __init__(self, tokens_a_tile: int, max_tiles: int, num_kv_heads: int, device: torch.device) -> None:
        self.tokens_a_tile = tokens_a_tile
        self._num_kv_heads = num_kv_heads
        self._programs = MAX_PROGRAMS if tokens_a_tile == 1 else _PROGRAMS_OF_LONG_TILES
        self._staged = PinnedStagingBuffer((2 + 4 * max_tiles,), torch.int32, device)
        self.counts, self.tiles = self._staged.tensor[:2], self._staged.tensor[2:].view(4, -1)

    def splits(self, num_tiles: int) -> int:
        """The number of parts into which a tile's past is cut at most, so that few tiles fill a GPU, too."""
        return max(1, min(MAX_SPLITS, self._programs // (max(1, num_tiles) * self._num_kv_heads)))

    def write(self, sequences: Sequence[tuple[int, SequenceSlice]], most_splits: int) -> None:
        """Writes the tiles of these sequences, each given with its row of the block table.

        Args:
            most_splits: splits that there is memory for.
        """
        tiles: list[tuple[int, int, int, int]] = []
        longest = 0
        for row, (start, length, context_length, _) in sequences:
            longest = max(longest, context_length)
            for offset in range(0, length, self.tokens_a_tile):
                num_tokens = min(self.tokens_a_tile, length - offset)
                tiles.append((row, start + offset, num_tokens, context_length - length + offset))
        numbers = self._staged.writable()
        if tiles:
            numbers[2:].reshape(4, -1)[:, : len(tiles)] = np.array(tiles, dtype=np.int32).T
        # At least two iterations a split, as a short past is not worth cutting.
        splits = min(most_splits, self.splits(len(tiles)), longest // (2 * KEYS_A_STEP))
        numbers[:2] = len(tiles), max(1, splits)
        self._staged.copy_to_device()


class StepTables:
    """The block table and the tiles of a step.

    blocks: int32 [max_num_seqs, max_blocks], a row a sequence: its cache blocks in order.
    singles: tiles of sequences with one token in the step; chunks: tiles of the others.
    """

    def __init__(
        self, singles: Tiles, chunks: Tiles, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.singles, self.chunks = singles, chunks
        self._blocks = PinnedStagingBuffer((max_num_seqs, max_blocks), torch.int32, device)
        self.blocks = self._blocks.tensor
        # The version of the block table that each row holds.
        self._written = [-1] * max_num_seqs

    def write(self, sequences: Sequence[SequenceSlice], single_splits: int, chunk_splits: int | None) -> None:
        """Writes the tables of a step.

        Args:
            single_splits, chunk_splits: splits that there is memory for; chunk_splits is None where the tiles of chunks
                are not read.
        """
        rows = list(enumerate(sequences))
        if chunk_splits is None:
            self.singles.write(rows, single_splits)
        else:
            self.singles.write([each for each in rows if each[1].length == 1], single_splits)
            self.chunks.write([each for each in rows if each[1].length > 1], chunk_splits)
        self._write_blocks([sequence.table for sequence in sequences])

    def _write_blocks(self, tables: list[BlockTable]) -> None:
        changed = [row for row, table in enumerate(tables) if table.version != self._written[row]]
        if not changed:
            return
        blocks_NB = self._blocks.writable()
        for row in changed:
            table = tables[row]
            blocks_NB[row, : len(table.blocks)] = table.blocks
            self._written[row] = table.version
        self._blocks.copy_to_device(*((row, slice(len(tables[row].blocks))) for row in changed))
