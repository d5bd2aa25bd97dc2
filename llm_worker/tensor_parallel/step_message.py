"""The message that sends a step from rank 0 to the other ranks: integers only.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import numpy.typing as npt

from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice

_INT = np.dtype("<i8")
_HEADER_LENGTH, _SEQUENCE_LENGTH, _LANDING_LENGTH, _SCORED_LENGTH = 9, 5, 6, 2
# Stands for the number of a sequence's blocks where they are the same as in the last step.
_UNCHANGED = -1


@dataclass(frozen=True)
class PoolLanding:
    """Embeddings of an item in a mapped pool, from row `first_row` on, for tokens [start, stop) of the step.

    pool: its number. offset: of the item's first row in the pool, bytes. num_rows: of the item.
    """

    pool: int
    offset: int
    num_rows: int
    first_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class StepMessage:
    """One step.

    integers_5T: see InputEmbedBuffer.staged_integers. sampled_tokens: see PreparedStep.
    with_deepstack: see InputEmbedBuffer.copy_to_device. landings: of embeddings that every rank reads itself.
    broadcast: tokens [start, stop) whose embeddings rank 0 broadcasts.
    scored: see PreparedStep; tokens [start, stop).
    """

    integers_5T: npt.NDArray[np.int64]
    sequences: Sequence[SequenceSlice]
    sampled_tokens: list[int]
    with_deepstack: bool
    landings: list[PoolLanding]
    broadcast: tuple[int, int]
    scored: list[tuple[int, int]] = field(default_factory=list)


class StepSerializer:
    """Serializes the steps for receivers that all get each message. A sequence's blocks are sent when they change."""

    def __init__(self) -> None:
        self._sent: set[int] = set()  # versions of the last step's tables

    def serialize_step(self, step: StepMessage) -> bytes:
        sequences: list[int] = []
        blocks: list[int] = []
        for start, length, context_length, table in step.sequences:
            is_new = table.version not in self._sent
            sequences += (start, length, context_length, table.version, len(table.blocks) if is_new else _UNCHANGED)
            blocks += table.blocks if is_new else ()
        self._sent = {sequence.table.version for sequence in step.sequences}
        counts = (step.integers_5T.shape[1], len(step.sequences), len(step.sampled_tokens), len(step.landings))
        parts = [
            (*counts, len(blocks), len(step.scored), step.with_deepstack, *step.broadcast),
            step.integers_5T.ravel(),
            sequences,
            step.sampled_tokens,
            [number for landing in step.landings for number in astuple(landing)],
            blocks,
            [number for tokens in step.scored for number in tokens],
        ]
        return np.concatenate([np.asarray(part, dtype=_INT) for part in parts]).tobytes()


class StepDeserializer:
    """Deserializes all steps of one serializer, in their order."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, BlockTable] = {}  # the last step's, by the sender's versions

    def deserialize_step(self, payload: bytes) -> StepMessage:
        """
        Raises:
            ValueError: the payload is no step.
        """
        numbers = np.frombuffer(payload, dtype=_INT)
        if len(numbers) < _HEADER_LENGTH:
            raise ValueError(
                f"a step message has {len(payload)} bytes, at least {_HEADER_LENGTH * _INT.itemsize} are needed"
            )
        header, rest = numbers[:_HEADER_LENGTH].tolist(), numbers[_HEADER_LENGTH:]
        num_tokens, num_sequences, num_sampled, num_landings, num_blocks, num_scored = header[:6]
        with_deepstack, start, stop = header[6:]
        lengths = [
            5 * num_tokens,
            _SEQUENCE_LENGTH * num_sequences,
            num_sampled,
            _LANDING_LENGTH * num_landings,
            num_blocks,
            _SCORED_LENGTH * num_scored,
        ]
        if min(lengths) < 0 or sum(lengths) != len(rest):
            raise ValueError(f"a step message has {len(rest)} numbers, its header asks for {lengths}")
        integers, sequences, sampled, landings, blocks, scored = np.split(rest, np.cumsum(lengths)[:-1])
        return StepMessage(
            integers.reshape(5, num_tokens),
            self._slices(sequences.reshape(-1, _SEQUENCE_LENGTH).tolist(), blocks.tolist()),
            sampled.tolist(),
            bool(with_deepstack),
            [PoolLanding(*each) for each in landings.reshape(-1, _LANDING_LENGTH).tolist()],
            (start, stop),
            [(first, behind) for first, behind in scored.reshape(-1, _SCORED_LENGTH).tolist()],
        )

    def _slices(self, sequences: list[list[int]], blocks: list[int]) -> list[SequenceSlice]:
        tables: dict[int, BlockTable] = {}
        slices: list[SequenceSlice] = []
        num_read = 0
        for start, length, context_length, version, num_blocks in sequences:
            table = self._tables.get(version)
            if num_blocks != _UNCHANGED:
                table = BlockTable(blocks[num_read : num_read + num_blocks])
                table.set_slots(self._block_size)
                num_read += num_blocks
            if table is None or len(table.slots) < context_length:
                raise ValueError(f"a sequence of {context_length} tokens came without its blocks")
            tables[version] = table
            slices.append(SequenceSlice(start, length, context_length, table))
        self._tables = tables
        return slices
