"""The Encoder service's method handlers: as generated, but Encode's responses go through our own codec."""

from __future__ import annotations

from typing import Any

import grpc

from embedding_transport.chunk_codec import serialize_response
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
MAX_MESSAGE_BYTES = 512 * 1024 * 1024
_KEEPALIVE_MS = 10_000
# For channels and servers alike.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # Media travel inside EncodeRequest; gRPC's own limit is 4 MiB.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that loses its network closes no connection. Both sides ask, so that requests move on and leases come back.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    # Tried with grpcio 1.85: without this one an unanswered ping is waited for far longer than the line above says.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
    # An idle Connect stream carries no data: ask all the same, and do not take it for an attack.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    # Encoders are addressed directly; the environment's proxy is for the world outside.
    ("grpc.enable_http_proxy", 0),
]


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
        "Connect": grpc.stream_stream_rpc_method_handler(
            servicer.Connect,
            encoder_pb2.ConnectRequest.FromString,
            encoder_pb2.ConnectResponse.SerializeToString,
        ),
        "Encode": grpc.unary_stream_rpc_method_handler(
            servicer.Encode, encoder_pb2.EncodeRequest.FromString, serialize_response
        ),
        "Release": grpc.unary_unary_rpc_method_handler(
            servicer.Release,
            encoder_pb2.ReleaseRequest.FromString,
            encoder_pb2.ReleaseResponse.SerializeToString,
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
