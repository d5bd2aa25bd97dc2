"""Rows assembled from chunks, and the buffers they lie in."""

from __future__ import annotations

import pytest
import torch

from tests.embedding_transport.clients.encoder_stub import IDENTITY
from vitrine_vlm.embedding_transport.receiving.received_rows import ChunkAssembly, HostBufferPool, copy_rows
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView
from vitrine_vlm.errors import InternalError
from vitrine_vlm.types import ItemTimings

NUM_TOKENS = 4
NBYTES = NUM_TOKENS * IDENTITY.row_nbytes


def chunk(offset: int, data: bytes) -> ChunkView:
    return ChunkView(0, offset, memoryview(data), None)


def test_rows_are_the_chunks_put_together() -> None:
    rows = torch.randn(4, IDENTITY.row_width)
    data = rows.numpy().tobytes()
    assembly = ChunkAssembly(NUM_TOKENS, IDENTITY, HostBufferPool())
    for start in range(0, NBYTES, 100):
        assert not assembly.complete
        assembly.add(chunk(start, data[start : start + 100]))
    assert assembly.complete
    main, deepstack = torch.zeros(2, 8), torch.zeros(3, 2, 8)
    assembly.rows(ItemTimings()).copy_to(main, deepstack, 1)
    assert torch.equal(torch.cat([main, *deepstack], dim=1), rows[1:3])


@pytest.mark.parametrize("offsets", [[4], [0, 8], [0, 0], [0, 4, NBYTES]])
def test_gaps_repeats_and_overruns_are_refused(offsets: list[int]) -> None:
    assembly = ChunkAssembly(NUM_TOKENS, IDENTITY, HostBufferPool())
    with pytest.raises(InternalError):
        for offset in offsets:
            assembly.add(chunk(offset, b"1234"))


def test_chunks_past_the_end_and_empty_ones_are_refused() -> None:
    for data in (bytes(NBYTES + 1), b""):
        with pytest.raises(InternalError):
            ChunkAssembly(NUM_TOKENS, IDENTITY, HostBufferPool()).add(chunk(0, data))


def test_rows_past_the_end_are_not_made_up() -> None:
    rows = torch.randn(4, IDENTITY.row_width)
    with pytest.raises(AssertionError):  # one row would be broadcast to both
        copy_rows(rows, torch.zeros(2, 8), torch.zeros(3, 2, 8), 3)


def test_rows_are_not_returned_before_they_are_complete() -> None:
    assembly = ChunkAssembly(NUM_TOKENS, IDENTITY, HostBufferPool())
    assembly.add(chunk(0, bytes(NBYTES - 1)))
    with pytest.raises(AssertionError):
        assembly.rows(ItemTimings())


def test_a_second_release_does_not_release_the_buffer_of_other_rows() -> None:
    pool = HostBufferPool()
    assembly = ChunkAssembly(NUM_TOKENS, IDENTITY, pool)
    assembly.add(chunk(0, bytes(NBYTES)))
    rows = assembly.rows(ItemTimings())
    rows.release()
    in_use = pool.allocate(NBYTES)
    rows.release()
    assert pool.allocate(NBYTES).data_ptr() != in_use.data_ptr()


def test_buffers_are_reused() -> None:
    pool = HostBufferPool()
    first = pool.allocate(5000)
    address = first.data_ptr()
    pool.release(first)
    assert pool.allocate(3000).data_ptr() == address
    assert pool.allocate(3000).data_ptr() != address

    assembly = ChunkAssembly(NUM_TOKENS, IDENTITY, pool)
    assembly.add(chunk(0, bytes(NBYTES)))
    rows = assembly.rows(ItemTimings())
    assembly.discard()  # the rows own the buffer now
    address = rows.rows_TW.data_ptr()
    rows.release()
    rows.release()
    assert pool.allocate(NBYTES).data_ptr() == address
    assert pool.allocate(NBYTES).data_ptr() != address
