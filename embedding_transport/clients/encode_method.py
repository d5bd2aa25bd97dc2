"""Encode as a client calls it: the responses stay serialized, because `chunk_codec` reads chunks without a copy."""

from __future__ import annotations

import grpc

from vitrine_vlm.protos.encoder.v1 import encoder_pb2

_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


def encode_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[encoder_pb2.EncodeRequest, bytes]:
    """Returns Encode on this channel; a call yields serialized responses, for `parse_response`."""
    return channel.unary_stream(
        f"/{_SERVICE}/Encode",
        request_serializer=encoder_pb2.EncodeRequest.SerializeToString,
        # grpc logs what a deserializer raises and returns None instead: bytes that are not a response must be an error.
        response_deserializer=None,
    )
