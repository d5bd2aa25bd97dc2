"""An EncodeRequest whose files come in pieces behind it, for `EncodeInPieces`.

A file's pieces are put together on a thread, and without the interpreter's lock. gRPC puts a message together on the
event loop of either side, and one of tens of megabytes keeps all else waiting there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace

from vitrine_vlm.embedding_transport.wire.chunk_codec import varint
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem

MAX_PIECE_NBYTES = 1024 * 1024
# With what surrounds a piece in its message; the first message has no files, and fits as well.
MAX_MESSAGE_NBYTES = MAX_PIECE_NBYTES + 64 * 1024
_PIECE = varint(encoder_pb2.EncodeRequest.PIECE_FIELD_NUMBER << 3 | 2)  # its tag, see `chunk_codec`


def files_nbytes(items: Iterable[MediaItem]) -> int:
    """Bytes of the files that would come in pieces."""
    return sum(map(len, _files(items)))


def first_message(request: encoder_pb2.EncodeRequest, items: Iterable[MediaItem]) -> bytes:
    """Returns the first message, serialized: the request with these items, but for their files."""
    first = encoder_pb2.EncodeRequest(items=map(_announced, items))
    first.MergeFrom(request)
    return first.SerializeToString()


async def in_pieces(first: bytes, items: Iterable[MediaItem]) -> AsyncIterator[bytes]:
    """The first message, and those with the files of the same items."""
    yield first
    for data in _files(items):
        for begin in range(0, len(data), MAX_PIECE_NBYTES):
            piece = memoryview(data)[begin : begin + MAX_PIECE_NBYTES]  # which copies nothing
            yield b"".join((_PIECE, varint(len(piece)), piece))


async def first_request(messages: AsyncIterator[encoder_pb2.EncodeRequest]) -> encoder_pb2.EncodeRequest:
    """
    Raises:
        BadRequest: there is no message.
    """
    request = await anext(messages, None)
    if request is None:
        raise BadRequest("the call has no request: send one")
    return request


async def read_files(
    request: encoder_pb2.EncodeRequest,
    messages: AsyncIterator[encoder_pb2.EncodeRequest],
    max_nbytes: int,
    joining: asyncio.Lock,
) -> list[bytes]:
    """The files that the first request announces, in its order.

    Args:
        messages: those behind the first.
        max_nbytes: of all files together.
        joining: held while a file is in memory twice.

    Raises:
        BadRequest: more bytes than are accepted, or pieces that are not those of what was announced.
    """
    lengths = list(_announced_lengths(request))
    if sum(lengths) > max_nbytes:
        raise BadRequest(
            f"files of {sum(lengths)} bytes are announced: at most {max_nbytes} are accepted in one request "
            "(--max-body-bytes)"
        )
    files: list[bytes] = []
    pieces: list[bytes] = []
    for length in lengths:
        for left in range(length, 0, -MAX_PIECE_NBYTES):
            pieces.append(await _next_piece(messages, min(left, MAX_PIECE_NBYTES)))
        if len(pieces) <= 1:
            files.append(b"".join(pieces))
            pieces.clear()
            continue
        async with joining:
            files.append(await asyncio.to_thread(b"".join, pieces))
            pieces.clear()
    if await anext(messages, None) is not None:
        raise BadRequest("a message behind the last piece of the request: send none")
    return files


async def _next_piece(messages: AsyncIterator[encoder_pb2.EncodeRequest], nbytes: int) -> bytes:
    """
    Raises:
        BadRequest: it does not have so many bytes, or there is none.
    """
    message = await anext(messages, None)
    piece = message.piece if message is not None else b""
    if len(piece) != nbytes:
        raise BadRequest(f"a piece of {len(piece)} bytes, where one of {nbytes} comes next")
    return piece


def _files(items: Iterable[MediaItem]) -> Iterator[bytes]:
    for item in items:
        if item.data is not None:
            yield item.data
        yield from _files(item.frames or ())


def _announced(item: MediaItem) -> encoder_pb2.MediaItem:
    """The item's message with the lengths of its files."""
    if item.data is not None:
        message = item_to_proto(replace(item, data=b""))
        message.data_nbytes = len(item.data)
        return message
    if item.frames is None:
        return item_to_proto(item)
    lengths = [len(frame.data) if frame.data is not None else None for frame in item.frames]
    frames = tuple(frame if frame.data is None else replace(frame, data=b"") for frame in item.frames)
    message = item_to_proto(replace(item, frames=frames))
    for frame, length in zip(message.frames.frames, lengths, strict=True):
        if length is not None:
            frame.data_nbytes = length
    return message


def _announced_lengths(request: encoder_pb2.EncodeRequest) -> Iterator[int]:
    for item in request.items:
        if item.HasField("data_nbytes"):
            yield item.data_nbytes
        yield from (frame.data_nbytes for frame in item.frames.frames if frame.HasField("data_nbytes"))
