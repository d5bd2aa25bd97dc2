"""A step arrives as it was sent; other payloads are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice
from vitrine_vlm.llm_worker.tensor_parallel.step_message import (
    PoolLanding,
    StepDeserializer,
    StepMessage,
    StepSerializer,
)

BLOCK_SIZE = 4


def table(*blocks: int) -> BlockTable:
    made = BlockTable(list(blocks))
    made.set_slots(BLOCK_SIZE)
    return made


def a_step(*sequences: SequenceSlice) -> StepMessage:
    landings = [PoolLanding(3, 4096 + 64, 9, 2, 1, 4), PoolLanding(3, 1 << 40, 9, 0, 4, 5)]
    # Part of a buffer, as the true ones are.
    return StepMessage(
        np.arange(50).reshape(5, 10)[:, :6] - 3, sequences, [4, 5], True, landings, (1, 3), [(0, 3), (4, 5)]
    )


def two_sequences() -> tuple[SequenceSlice, SequenceSlice]:
    return SequenceSlice(0, 5, 7, table(7, 2, 5)), SequenceSlice(5, 1, 3, table(1))


def test_there_and_back() -> None:
    sent = a_step(*two_sequences())
    received = StepDeserializer(BLOCK_SIZE).deserialize_step(StepSerializer().serialize_step(sent))
    assert np.array_equal(received.integers_5T, sent.integers_5T)
    assert [each[:3] for each in received.sequences] == [(0, 5, 7), (5, 1, 3)]
    for theirs, ours in zip(received.sequences, sent.sequences, strict=True):
        assert theirs.table.blocks == ours.table.blocks and torch.equal(theirs.slots, ours.slots)
    assert received.sampled_tokens == [4, 5] and received.with_deepstack is True
    assert (received.landings, received.broadcast) == (sent.landings, (1, 3))
    assert received.scored == [(0, 3), (4, 5)]


def test_nothing_to_sample_or_to_land() -> None:
    sent = StepMessage(np.zeros((5, 1), dtype=np.int64), two_sequences()[1:], [], False, [], (0, 0))
    received = StepDeserializer(BLOCK_SIZE).deserialize_step(StepSerializer().serialize_step(sent))
    assert (received.sampled_tokens, received.landings, received.with_deepstack) == ([], [], False)
    assert received.scored == []


def test_blocks_come_again_only_where_they_have_changed() -> None:
    serializer, deserializer = StepSerializer(), StepDeserializer(BLOCK_SIZE)
    grows, stays = two_sequences()
    first = serializer.serialize_step(a_step(grows, stays))
    before = deserializer.deserialize_step(first).sequences
    same = serializer.serialize_step(a_step(grows, stays))
    assert len(same) == len(first) - 4 * 8
    assert [each.table for each in deserializer.deserialize_step(same).sequences] == [each.table for each in before]

    grows.table.blocks.append(9)
    grows.table.set_slots(BLOCK_SIZE)
    after = deserializer.deserialize_step(serializer.serialize_step(a_step(grows, stays))).sequences
    assert [each.table.blocks for each in after] == [[7, 2, 5, 9], [1]]
    assert after[0].table.version != before[0].table.version and after[1].table is before[1].table

    # The blocks of a sequence that was not in the last step are sent again.
    deserializer.deserialize_step(serializer.serialize_step(a_step(stays)))
    assert deserializer.deserialize_step(serializer.serialize_step(a_step(grows, stays))).sequences[0].table.blocks == [
        7,
        2,
        5,
        9,
    ]


@pytest.mark.parametrize("length", [0, 5, -1])
def test_a_step_that_was_cut_off_is_refused(length: int) -> None:
    numbers = np.frombuffer(StepSerializer().serialize_step(a_step(*two_sequences())), dtype="<i8")
    with pytest.raises(ValueError, match="a step message has"):
        StepDeserializer(BLOCK_SIZE).deserialize_step(numbers[:length].tobytes())


@pytest.mark.parametrize(("position", "number"), [(0, 7), (0, -1), (1, 3), (4, 2), (4, 1 << 60)])
def test_counts_that_do_not_fit_are_refused(position: int, number: int) -> None:
    numbers = np.frombuffer(StepSerializer().serialize_step(a_step(*two_sequences())), dtype="<i8").copy()
    numbers[position] = number
    with pytest.raises(ValueError, match="a step message has"):
        StepDeserializer(BLOCK_SIZE).deserialize_step(numbers.tobytes())


def test_a_sequence_without_its_blocks_is_refused() -> None:
    serializer, sequences = StepSerializer(), two_sequences()
    serializer.serialize_step(a_step(*sequences))
    with pytest.raises(ValueError, match="without its blocks"):
        StepDeserializer(BLOCK_SIZE).deserialize_step(serializer.serialize_step(a_step(*sequences)))
