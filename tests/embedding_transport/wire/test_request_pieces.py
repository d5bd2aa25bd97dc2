"""Requests in pieces are the same requests, and a peer that announces one thing and sends another is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from vitrine_vlm.embedding_transport.wire import request_pieces
from vitrine_vlm.embedding_transport.wire.request_pieces import (
    files_nbytes,
    first_message,
    first_request,
    in_pieces,
    read_files,
)
from vitrine_vlm.encoder_service.codec import item_from_proto
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem, MediaOptions, Ticket

FRAMES = (
    MediaItem("image", data=b"frame" * 500),
    MediaItem("image", url="https://example.com/frame"),
    MediaItem("image", data=b"f"),
)
ITEMS = [
    MediaItem("image", data=b""),
    MediaItem("image", data=bytes(range(250)) * 10, options=MediaOptions(min_pixels=4096)),
    MediaItem("image", url="https://example.com/picture"),
    MediaItem("video", frames=FRAMES, options=MediaOptions(fps=2.0)),
    MediaItem("image", ticket=Ticket("", bytes(16))),
    MediaItem("video", data=bytes(1000), options=MediaOptions(fps=2.0)),
]
HEAD = encoder_pb2.EncodeRequest(request_id="id", session_id="session", tenant="tenant", layout_only=True)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_pieces, "MAX_PIECE_NBYTES", 1000)


async def parsed(messages: AsyncIterator[bytes]) -> AsyncIterator[encoder_pb2.EncodeRequest]:
    async for message in messages:
        yield encoder_pb2.EncodeRequest.FromString(message)


async def test_the_request_is_the_same() -> None:
    messages = [each async for each in in_pieces(first_message(HEAD, ITEMS), ITEMS)]
    assert len(messages) == 1 + 3 + 3 + 1 + 1
    assert all(len(each) < 1100 for each in messages[1:])

    async def sent() -> AsyncIterator[bytes]:
        for each in messages:
            yield each

    received = parsed(sent())
    request = await first_request(received)
    files = await read_files(request, received, files_nbytes(ITEMS), asyncio.Lock())
    of_items = iter(files)
    assert [item_from_proto(index, each, of_items) for index, each in enumerate(request.items)] == ITEMS
    del request.items[:]
    assert request == HEAD and next(of_items, None) is None


@pytest.mark.parametrize(
    ("lengths", "pieces", "message"),
    [
        (None, [], "the call has no request"),
        ([1500], [1000], "a piece of 0 bytes, where one of 500 comes next"),
        ([1500], [1000, 501], "a piece of 501 bytes, where one of 500 comes next"),
        ([1500], [1001], "a piece of 1001 bytes, where one of 1000 comes next"),
        ([1500], [999, 501], "a piece of 999 bytes, where one of 1000 comes next"),
        ([1500], [1000, 0], "a piece of 0 bytes"),
        ([10, 10], [20], "a piece of 20 bytes, where one of 10 comes next"),
        ([10], [10, 1], "behind the last piece"),
        ([2000, 2001], [], "files of 4001 bytes are announced: at most 4000"),
        ([2**64 - 1], [], "at most 4000 are accepted"),
    ],
)
async def test_what_was_not_announced_is_refused(lengths: list[int] | None, pieces: list[int], message: str) -> None:
    async def sent() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        if lengths is not None:
            yield encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem(data_nbytes=each) for each in lengths])
        for nbytes in pieces:
            yield encoder_pb2.EncodeRequest(piece=bytes(nbytes))

    with pytest.raises(BadRequest, match=message):
        messages = sent()
        await read_files(await first_request(messages), messages, 4000, asyncio.Lock())


def test_files_that_are_announced_and_not_sent() -> None:
    message = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data_nbytes=5)
    with pytest.raises(BadRequest, match="item 3 has data_nbytes: files in pieces are for EncodeInPieces"):
        item_from_proto(3, message)
