"""The Encoder service's method handlers: as generated, but Encode's responses go through our own codec."""

from __future__ import annotations

from typing import Any

import grpc

from embedding_transport.chunk_codec import serialize_response
from embedding_transport.session_rpc import session_handlers
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


def encoder_handlers(servicer: encoder_pb2_grpc.EncoderServicer) -> grpc.GenericRpcHandler:
    """Handlers of all methods, for `server.add_generic_rpc_handlers`.

    `servicer.Encode` yields EncodeResponse messages or chunks that `encode_chunk` serialized.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe,
            encoder_pb2.DescribeRequest.FromString,
            encoder_pb2.DescribeResponse.SerializeToString,
        ),
        **session_handlers(servicer),
        "Encode": grpc.unary_stream_rpc_method_handler(
            servicer.Encode, encoder_pb2.EncodeRequest.FromString, serialize_response
        ),
        "GetStats": grpc.unary_unary_rpc_method_handler(
            servicer.GetStats,
            encoder_pb2.GetStatsRequest.FromString,
            encoder_pb2.GetStatsResponse.SerializeToString,
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def encode_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[encoder_pb2.EncodeRequest, bytes]:
    """Encode on a channel; yields serialized responses, for `parse_response`."""
    return channel.unary_stream(
        f"/{SERVICE}/Encode",
        request_serializer=encoder_pb2.EncodeRequest.SerializeToString,
        # grpc logs what a deserializer raises and hands out None instead: bytes that are no response must be an error.
        response_deserializer=None,
    )
