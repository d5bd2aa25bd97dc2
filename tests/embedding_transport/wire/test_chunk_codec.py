"""Chunks framed by hand are what the generated classes read and write; damaged ones are refused."""

from __future__ import annotations

import random

import pytest

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView, encode_chunk, parse_response, serialize_response
from vitrine_vlm.errors import InternalError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem

CASES = [
    (0, 0, b"", None),
    (0, 0, b"x", encoder_pb2.ItemTimings()),
    (3, 1 << 40, bytes(range(256)) * 5, encoder_pb2.ItemTimings(load_ms=1.5, forward_ms=2)),
    (2**32 - 1, 127, b"\x00" * 128, None),
]


@pytest.mark.parametrize(("item_index", "offset", "data", "timings"), CASES)
def test_written_chunks_are_read_by_the_generated_classes(
    item_index: int, offset: int, data: bytes, timings: encoder_pb2.ItemTimings | None
) -> None:
    raw = encode_chunk(item_index, offset, memoryview(data), timings)
    expected = encoder_pb2.Chunk(item_index=item_index, offset=offset, data=data, timings=timings)
    assert encoder_pb2.EncodeResponse.FromString(raw) == encoder_pb2.EncodeResponse(chunk=expected)
    assert serialize_response(raw) is raw


@pytest.mark.parametrize(("item_index", "offset", "data", "timings"), CASES)
def test_generated_chunks_are_read_as_views(
    item_index: int, offset: int, data: bytes, timings: encoder_pb2.ItemTimings | None
) -> None:
    chunk = encoder_pb2.Chunk(item_index=item_index, offset=offset, data=data, timings=timings)
    raw = serialize_response(encoder_pb2.EncodeResponse(chunk=chunk))
    view = parse_response(raw, encoder_pb2.EncodeResponse)
    assert isinstance(view, ChunkView)
    assert (view.item_index, view.offset, bytes(view.data), view.timings) == (item_index, offset, data, timings)
    assert view.data.obj is raw


def test_other_responses_pass_through() -> None:
    response = encoder_pb2.EncodeResponse(layout=encoder_pb2.Layout(item_index=1, grid_thw=[1, 2, 4], num_tokens=2))
    assert parse_response(serialize_response(response), encoder_pb2.EncodeResponse) == response


def test_damaged_bytes_are_refused_or_read_but_never_more() -> None:
    rng = random.Random(0)
    timings = encoder_pb2.ItemTimings(load_ms=1)
    whole = encode_chunk(5, 1000, memoryview(b"payload" * 20), timings)
    num_refused = 0
    for _ in range(5000):
        raw = bytearray(whole[: rng.randint(0, len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randint(0, 3)):
            if raw:
                raw[rng.randrange(min(len(raw), 16))] = rng.randrange(256)
        try:
            parsed = parse_response(bytes(raw), encoder_pb2.EncodeResponse)
        except InternalError:
            num_refused += 1
        else:
            assert not isinstance(parsed, ChunkView) or parsed.data.nbytes <= len(raw)
    assert num_refused > 1000


def test_false_lengths_are_refused() -> None:
    whole = encode_chunk(1, 2, memoryview(b"1234"))
    assert whole[-5:] == b"\x041234"
    longer_data = whole[:-5] + b"\x051234"
    more_behind = whole + whole[2:4]  # the chunk's first field once more, outside its length
    for raw in (longer_data, more_behind):
        with pytest.raises(InternalError, match="bytes"):
            parse_response(raw, encoder_pb2.EncodeResponse)


class Damaged(StubServicer):
    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        yield request.items[0].data


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", encode_chunk(0, 0, memoryview(b"1234"))[:-1], b""])
async def test_damaged_bytes_on_the_wire_are_an_error_of_the_call(raw: bytes) -> None:
    async with running_stub(None, servicer_class=Damaged) as (address, _, _):
        client = EncoderClient([address], IDENTITY, transport="grpc")
        await client.start()
        with pytest.raises(InternalError):
            [event async for event in client.encode([MediaItem("image", data=raw)], "request")]
        await client.close()
