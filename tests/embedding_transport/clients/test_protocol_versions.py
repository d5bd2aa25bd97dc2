"""Clients from before minor version 1 of the protocol work with new encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields

from tests.encoder_service.running import png, run_encoder
from vitrine_vlm.protos.encoder.v1 import encoder_pb2

# What minor versions 1 to 4 have added, by message; 5 has added no field.
ADDED = {
    "DescribeResponse": {"protocol_minor_version", "instance_id", "ticket_ttl_s", "patch_dtypes"},
    "MediaItem": {"patches", "ticket", "frames", "options", "data_nbytes"},
    "Frame": {"data_nbytes"},
    "EncodeRequest": {"layout_only", "call_id", "compute_ahead", "piece"},
    "Layout": {"ticket", "queue_s", "encode_s"},
    "ReleaseRequest": {"tickets", "unread_calls"},
    "GetStatsResponse": {"num_live_tickets", "ticket_bytes"},
}


def old_messages() -> dict[str, Any]:
    """The message classes of minor version 0."""
    file = descriptor_pb2.FileDescriptorProto()
    encoder_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        kept = [field for field in message.field if field.name not in ADDED.get(message.name, ())]
        assert len(message.field) - len(kept) == len(ADDED.get(message.name, ())), message.name
        del message.field[:]
        message.field.extend(kept)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    package = encoder_pb2.DESCRIPTOR.package
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{message.name}"))
        for message in file.message_type
    }


async def test_an_old_client_encodes_on_a_new_encoder(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    old = old_messages()
    picture = png(96, 64)

    service = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        describe = encoder.channel.unary_unary(
            f"/{service}/Describe",
            request_serializer=old["DescribeRequest"].SerializeToString,
            response_deserializer=old["DescribeResponse"].FromString,
        )
        description = await describe(old["DescribeRequest"]())
        assert (description.protocol_version, description.model) == (1, encoder.identity.model)
        assert not hasattr(description, "instance_id") and len(unknown_fields.UnknownFieldSet(description)) > 0

        encode = encoder.channel.unary_stream(
            f"/{service}/Encode",
            request_serializer=old["EncodeRequest"].SerializeToString,
            response_deserializer=old["EncodeResponse"].FromString,
        )
        item = old["MediaItem"](kind=encoder_pb2.MEDIA_KIND_IMAGE, data=picture)
        responses = [response async for response in encode(old["EncodeRequest"](items=[item], tenant="t"))]
        layout, chunk = responses[0].layout, responses[-1].chunk
        assert (list(layout.grid_thw), layout.num_tokens, len(layout.content_hash)) == ([1, 4, 6], 6, 32)
        assert len(unknown_fields.UnknownFieldSet(layout)) == 0, "an answer to an old client has something new in it"
        assert len(chunk.data) == 6 * 384 * 4

        release = encoder.channel.unary_unary(
            f"/{service}/Release",
            request_serializer=old["ReleaseRequest"].SerializeToString,
            response_deserializer=old["ReleaseResponse"].FromString,
        )
        assert (await release(old["ReleaseRequest"](lease_ids=[7]))).num_unknown == 1
        assert len(encoder.tickets) == 0
