"""Requests that are framed by hand are those of the generated classes."""

from __future__ import annotations

import pytest

from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.embedding_transport.wire.request_codec import serialize_request
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem, MediaOptions, Patches, Ticket

FRAMES = (MediaItem("image", data=b"frame"), MediaItem("image", url="https://example.com/frame"))
ITEMS = [
    MediaItem("image", data=b""),
    MediaItem("image", data=b"picture", options=MediaOptions(min_pixels=4096)),
    MediaItem("video", data=bytes(300), options=MediaOptions(fps=2.0)),
    MediaItem("image", url="https://example.com/picture"),
    MediaItem("video", frames=FRAMES),
    MediaItem("image", patches=Patches(bytes(3 * 2 * 16 * 16), "uint8", False, (1, 1, 1))),
    MediaItem("image", ticket=Ticket("encoder", bytes(16))),
    MediaItem("image", data=bytes(2 << 20)),
]


@pytest.mark.parametrize("items", [[], *([item] for item in ITEMS), ITEMS])
async def test_the_message_is_that_of_the_generated_classes(items: list[MediaItem]) -> None:
    head = encoder_pb2.EncodeRequest(request_id="id", session_id="session", tenant="tenant", layout_only=True)
    expected = encoder_pb2.EncodeRequest(items=map(item_to_proto, items))
    expected.MergeFrom(head)
    assert encoder_pb2.EncodeRequest.FromString(await serialize_request(head, items)) == expected
