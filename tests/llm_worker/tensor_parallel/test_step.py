"""A step arrives as it was sent; what is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_worker.models.paged_attention import BlockTable, SequenceSlice
from llm_worker.tensor_parallel.step import PoolLanding, Step, StepDecoder, StepEncoder

BLOCK_SIZE = 4


def table(*blocks: int) -> BlockTable:
    made = BlockTable(list(blocks))
    made.set_slots(BLOCK_SIZE)
    return made


def a_step(*sequences: SequenceSlice) -> Step:
    landings = [PoolLanding(3, 4096 + 64, 9, 2, 1, 4), PoolLanding(3, 1 << 40, 9, 0, 4, 5)]
    # Part of a buffer, as the true ones are.
    return Step(np.arange(50).reshape(5, 10)[:, :6] - 3, sequences, [4, 5], True, landings, (1, 3))


def two_sequences() -> tuple[SequenceSlice, SequenceSlice]:
    return SequenceSlice(0, 5, 7, table(7, 2, 5)), SequenceSlice(5, 1, 3, table(1))


def test_there_and_back() -> None:
    sent = a_step(*two_sequences())
    received = StepDecoder(BLOCK_SIZE).decode(StepEncoder().encode(sent))
    assert np.array_equal(received.integers_5T, sent.integers_5T)
    assert [each[:3] for each in received.sequences] == [(0, 5, 7), (5, 1, 3)]
    for theirs, ours in zip(received.sequences, sent.sequences, strict=True):
        assert theirs.table.blocks == ours.table.blocks and torch.equal(theirs.slots, ours.slots)
    assert received.sampled_rows == [4, 5] and received.with_deepstack is True
    assert (received.landings, received.from_rank_0) == (sent.landings, (1, 3))


def test_nothing_to_sample_or_to_land() -> None:
    sent = Step(np.zeros((5, 1), dtype=np.int64), two_sequences()[1:], [], False, [], (0, 0))
    received = StepDecoder(BLOCK_SIZE).decode(StepEncoder().encode(sent))
    assert (received.sampled_rows, received.landings, received.with_deepstack) == ([], [], False)


def test_blocks_come_again_only_where_they_have_changed() -> None:
    encoder, decoder = StepEncoder(), StepDecoder(BLOCK_SIZE)
    grows, stays = two_sequences()
    first = encoder.encode(a_step(grows, stays))
    before = decoder.decode(first).sequences
    same = encoder.encode(a_step(grows, stays))
    assert len(same) == len(first) - 4 * 8
    assert [each.table for each in decoder.decode(same).sequences] == [each.table for each in before]

    grows.table.blocks.append(9)
    grows.table.set_slots(BLOCK_SIZE)
    after = decoder.decode(encoder.encode(a_step(grows, stays))).sequences
    assert [each.table.blocks for each in after] == [[7, 2, 5, 9], [1]]
    assert after[0].table.version != before[0].table.version and after[1].table is before[1].table

    # A sequence that takes no part in a step is told anew when it comes back.
    decoder.decode(encoder.encode(a_step(stays)))
    assert decoder.decode(encoder.encode(a_step(grows, stays))).sequences[0].table.blocks == [7, 2, 5, 9]


@pytest.mark.parametrize("length", [0, 5, -1])
def test_a_step_that_was_cut_off_is_refused(length: int) -> None:
    numbers = np.frombuffer(StepEncoder().encode(a_step(*two_sequences())), dtype="<i8")
    with pytest.raises(ValueError, match="a step of"):
        StepDecoder(BLOCK_SIZE).decode(numbers[:length].tobytes())


@pytest.mark.parametrize(("position", "number"), [(0, 7), (0, -1), (1, 3), (4, 2), (4, 1 << 60)])
def test_counts_that_do_not_fit_are_refused(position: int, number: int) -> None:
    numbers = np.frombuffer(StepEncoder().encode(a_step(*two_sequences())), dtype="<i8").copy()
    numbers[position] = number
    with pytest.raises(ValueError, match="a step of"):
        StepDecoder(BLOCK_SIZE).decode(numbers.tobytes())


def test_a_sequence_without_its_blocks_is_refused() -> None:
    encoder, sequences = StepEncoder(), two_sequences()
    encoder.encode(a_step(*sequences))
    with pytest.raises(ValueError, match="blocks did not come"):
        StepDecoder(BLOCK_SIZE).decode(encoder.encode(a_step(*sequences)))
