"""The Encoder service's method handlers: as generated, except that `chunk_codec` serializes both Encodes' responses."""

from __future__ import annotations

from typing import Any

import grpc

from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules, for_allowed_peers
from vitrine_vlm.embedding_transport.shipping.session_rpc import session_handlers
from vitrine_vlm.embedding_transport.wire.chunk_codec import serialize_response
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


def encoder_handlers(
    servicer: encoder_pb2_grpc.EncoderServicer, rules: PeerRules | None = None
) -> grpc.GenericRpcHandler:
    """Returns handlers of all methods, for `server.add_generic_rpc_handlers`.

    Both Encodes of the servicer write EncodeResponse messages, or chunks that `encode_chunk` serialized.

    Args:
        rules: the servicer's methods, coroutines that write, are called for allowed peers only.
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
        "EncodeInPieces": grpc.stream_stream_rpc_method_handler(
            servicer.EncodeInPieces, encoder_pb2.EncodeRequest.FromString, serialize_response
        ),
        "GetStats": grpc.unary_unary_rpc_method_handler(
            servicer.GetStats,
            encoder_pb2.GetStatsRequest.FromString,
            encoder_pb2.GetStatsResponse.SerializeToString,
        ),
    }
    if rules is not None:
        handlers = for_allowed_peers(handlers, rules)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)
