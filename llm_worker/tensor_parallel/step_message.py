"""A step as rank 0 sends it to the other ranks: integers only.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice

_INT = np.dtype("<i8")
_HEADER_LENGTH, _SEQUENCE_LENGTH, _LANDING_LENGTH = 8, 5, 6
# In place of the number of a sequence's blocks: they are those of the step before.
_KNOWN = -1


@dataclass(frozen=True)
class PoolLanding:
    """Embeddings of an item in a mapped pool, from `first_row` on, for tokens [start, stop) of the step.

    pool: its number. offset, num_rows: where in the pool the item's rows lie, bytes, and how many they are.
    """

    pool: int
    offset: int
    num_rows: int
    first_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class StepMessage:
    """integers_5T: as of InputEmbedBuffer.staged_integers.

    sampled_tokens: as of PreparedStep. with_deepstack: as of InputEmbedBuffer.copy_to_device.
    landings: those that every rank reads by itself. broadcast: tokens [start, stop) whose embeddings rank 0 broadcasts.
    """

    integers_5T: npt.NDArray[np.int64]
    sequences: Many[SequenceSlice]
    sampled_tokens: list[int]
    with_deepstack: bool
    landings: list[PoolLanding]
    broadcast: tuple[int, int]


class StepSerializer:
    """For one receiver, or several that get the same messages. A sequence's blocks are sent when they have changed."""

    def __init__(self) -> None:
        self._sent: set[int] = set()  # versions of the tables of the step before

    def serialize_step(self, step: StepMessage) -> bytes:
        sequences: list[int] = []
        blocks: list[int] = []
        for start, length, context_length, table in step.sequences:
            is_new = table.version not in self._sent
            sequences += (start, length, context_length, table.version, len(table.blocks) if is_new else _KNOWN)
            blocks += table.blocks if is_new else ()
        self._sent = {sequence.table.version for sequence in step.sequences}
        counts = (step.integers_5T.shape[1], len(step.sequences), len(step.sampled_tokens), len(step.landings))
        parts = [
            (*counts, len(blocks), step.with_deepstack, *step.broadcast),
            step.integers_5T.ravel(),
            sequences,
            step.sampled_tokens,
            [number for landing in step.landings for number in astuple(landing)],
            blocks,
        ]
        return np.concatenate([np.asarray(part, dtype=_INT) for part in parts]).tobytes()


class StepDeserializer:
    """Of all steps that one serializer has made, in their order."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, BlockTable] = {}  # of the step before, by the sender's versions

    def deserialize_step(self, payload: bytes) -> StepMessage:
        """
        Raises:
            ValueError: this is no step.
        """
        numbers = np.frombuffer(payload, dtype=_INT)
        if len(numbers) < _HEADER_LENGTH:
            raise ValueError(f"a step of {len(payload)} bytes")
        header, rest = numbers[:_HEADER_LENGTH].tolist(), numbers[_HEADER_LENGTH:]
        num_tokens, num_sequences, num_sampled, num_landings, num_blocks, with_deepstack, start, stop = header
        lengths = [
            5 * num_tokens,
            _SEQUENCE_LENGTH * num_sequences,
            num_sampled,
            _LANDING_LENGTH * num_landings,
            num_blocks,
        ]
        if min(lengths) < 0 or sum(lengths) != len(rest):
            raise ValueError(f"a step of {len(rest)} numbers whose parts have {lengths}")
        integers, sequences, sampled, landings, blocks = np.split(rest, np.cumsum(lengths)[:-1])
        return StepMessage(
            integers.reshape(5, num_tokens),
            self._slices(sequences.reshape(-1, _SEQUENCE_LENGTH).tolist(), blocks.tolist()),
            sampled.tolist(),
            bool(with_deepstack),
            [PoolLanding(*each) for each in landings.reshape(-1, _LANDING_LENGTH).tolist()],
            (start, stop),
        )

    def _slices(self, sequences: list[list[int]], blocks: list[int]) -> list[SequenceSlice]:
        tables: dict[int, BlockTable] = {}
        slices: list[SequenceSlice] = []
        taken = 0
        for start, length, context_length, version, num_blocks in sequences:
            table = self._tables.get(version)
            if num_blocks != _KNOWN:
                table = BlockTable(blocks[taken : taken + num_blocks])
                table.set_slots(self._block_size)
                taken += num_blocks
            if table is None or len(table.slots) < context_length:
                raise ValueError(f"a sequence of {context_length} tokens whose blocks did not come")
            tables[version] = table
            slices.append(SequenceSlice(start, length, context_length, table))
        self._tables = tables
        return slices
