"""Both Encodes as a client calls them: messages are serialized already, see `wire`."""

from __future__ import annotations

import grpc

from vitrine_vlm.protos.encoder.v1 import encoder_pb2

_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


def encode_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[bytes, bytes]:
    """Returns Encode on this channel; a call takes what `request_codec.serialize_request` returns, and yields
    serialized responses, for `chunk_codec.parse_response`."""
    return channel.unary_stream(
        f"/{_SERVICE}/Encode",
        request_serializer=None,
        # grpc logs what a deserializer raises and returns None instead: bytes that are not a response must be an error.
        response_deserializer=None,
    )


def encode_in_pieces_method(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
    """Likewise EncodeInPieces; a call takes what `request_pieces.in_pieces` yields."""
    return channel.stream_stream(f"/{_SERVICE}/EncodeInPieces", request_serializer=None, response_deserializer=None)
