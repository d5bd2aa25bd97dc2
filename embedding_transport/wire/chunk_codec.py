"""The wire format of EncodeResponse, with the bytes of a chunk framed by hand.

The generated classes would copy a chunk's bytes twice on each side. Here a chunk is written with one copy and read as a
view. The bytes are exactly those that encoder.proto defines, so clients with generated classes work as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from vitrine_vlm.errors import InternalError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2

# Protobuf tags: field number << 3 | wire type (0 varint, 2 length-delimited).
_RESPONSE_CHUNK = encoder_pb2.EncodeResponse.CHUNK_FIELD_NUMBER << 3 | 2
_ITEM_INDEX = encoder_pb2.Chunk.ITEM_INDEX_FIELD_NUMBER << 3
_OFFSET = encoder_pb2.Chunk.OFFSET_FIELD_NUMBER << 3
_DATA = encoder_pb2.Chunk.DATA_FIELD_NUMBER << 3 | 2
_TIMINGS = encoder_pb2.Chunk.TIMINGS_FIELD_NUMBER << 3 | 2
_MAX_VARINT_BYTES = 10

ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True)
class ChunkView:
    """A received chunk. `data` is a view of the received message; only an item's last chunk has `timings`."""

    item_index: int
    offset: int
    data: memoryview
    timings: encoder_pb2.ItemTimings | None


def encode_chunk(
    item_index: int, offset: int, data: memoryview, timings: encoder_pb2.ItemTimings | None = None
) -> bytes:
    """Returns a serialized EncodeResponse with this chunk; `data` is copied once.

    Args:
        offset: the position of `data` within the item's rows, in bytes.
        data: contiguous bytes.
    """
    head = varint(_ITEM_INDEX) + varint(item_index) + varint(_OFFSET) + varint(offset)
    tail = b""
    if timings is not None:
        encoded = timings.SerializeToString()
        tail = varint(_TIMINGS) + varint(len(encoded)) + encoded
    head += varint(_DATA) + varint(data.nbytes)
    chunk_nbytes = len(head) + data.nbytes + len(tail)
    return b"".join((varint(_RESPONSE_CHUNK), varint(chunk_nbytes), head, data, tail))


def serialize_response(response: Message | bytes) -> bytes:
    """Serializes a response; a chunk from `encode_chunk` is already serialized."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def parse_response(raw: bytes, response: type[ResponseT]) -> ResponseT | ChunkView:
    """The inverse of `serialize_response`.

    Args:
        response: EncodeResponse, or another message whose field `chunk` has the same number.

    Raises:
        InternalError: the bytes are not such a message.
    """
    try:
        if raw[:1] == bytes((_RESPONSE_CHUNK,)):
            return _parse_chunk(memoryview(raw))
        return response.FromString(raw)
    except (DecodeError, ValueError) as error:
        raise InternalError(f"the other side sent {len(raw)} bytes that are not a response: {error}") from error


def _parse_chunk(raw: memoryview) -> ChunkView:
    nbytes, position = _read_varint(raw, 1)
    if nbytes != len(raw) - position:
        raise ValueError(f"a chunk of {nbytes} bytes in a message of {len(raw)}")
    numbers = {_ITEM_INDEX: 0, _OFFSET: 0}
    data, timings = raw[:0], None
    while position < len(raw):
        tag, position = _read_varint(raw, position)
        value, position = _read_varint(raw, position)
        if tag in numbers:
            numbers[tag] = value
        elif tag in (_DATA, _TIMINGS):
            end = position + value
            if end > len(raw):
                raise ValueError(f"a field of {value} bytes at {position} in a message of {len(raw)}")
            if tag == _DATA:
                data = raw[position:end]
            else:
                timings = encoder_pb2.ItemTimings.FromString(bytes(raw[position:end]))
            position = end
        else:
            raise ValueError(f"unknown field tag {tag}")
    return ChunkView(numbers[_ITEM_INDEX], numbers[_OFFSET], data, timings)


def varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(raw: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(raw):
            raise ValueError("the message ends inside a number")
        byte = raw[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a number longer than 10 bytes")
