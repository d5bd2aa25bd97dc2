"""Encode as a client calls it: the responses stay serialized, because our own codec reads chunks without a copy."""

from __future__ import annotations

import grpc

from vitrine_vlm.protos.encoder.v1 import encoder_pb2

_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


def encode_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[encoder_pb2.EncodeRequest, bytes]:
    """Encode on a channel; yields serialized responses, for `parse_response`."""
    return channel.unary_stream(
        f"/{_SERVICE}/Encode",
        request_serializer=encoder_pb2.EncodeRequest.SerializeToString,
        # grpc logs what a deserializer raises and hands out None instead: bytes that are no response must be an error.
        response_deserializer=None,
    )
