"""The wire format of EncodeRequest, with the bytes of media framed by hand.

The generated classes would copy them three times, while they hold the interpreter's lock; here they are copied once,
without it. The bytes are exactly those that encoder.proto defines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from vitrine_vlm.embedding_transport.wire.chunk_codec import varint
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem

# Protobuf tags, see `chunk_codec`.
_ITEMS = varint(encoder_pb2.EncodeRequest.ITEMS_FIELD_NUMBER << 3 | 2)
_DATA = varint(encoder_pb2.MediaItem.DATA_FIELD_NUMBER << 3 | 2)
# A larger message takes longer to copy than a thread takes to start.
_LARGE_NBYTES = 1024 * 1024


async def serialize_request(request: encoder_pb2.EncodeRequest, items: Iterable[MediaItem]) -> bytes:
    """Returns a serialized EncodeRequest with these items; a large one is written on a thread."""
    pieces = [request.SerializeToString()]
    for item in items:
        if item.data is None:
            message, data = item_to_proto(item).SerializeToString(), b""
        else:
            # Where a field comes twice its last value counts: the empty one of this message does not.
            message, data = item_to_proto(replace(item, data=b"")).SerializeToString(), item.data
            message += _DATA + varint(len(data))
        pieces += (_ITEMS + varint(len(message) + len(data)) + message, data)
    if sum(map(len, pieces)) < _LARGE_NBYTES:
        return b"".join(pieces)
    return await asyncio.to_thread(b"".join, pieces)
