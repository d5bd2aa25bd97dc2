"""The Prefill service's methods, as generated, except that responses pass through the chunk codec."""

from __future__ import annotations

from typing import Any

import grpc

from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules, for_allowed_peers
from vitrine_vlm.embedding_transport.shipping.session_rpc import session_handlers
from vitrine_vlm.embedding_transport.wire.chunk_codec import serialize_response
from vitrine_vlm.protos.prefill.v1 import prefill_pb2, prefill_pb2_grpc

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name


def prefill_handlers(
    servicer: prefill_pb2_grpc.PrefillServicer, rules: PeerRules | None = None
) -> grpc.GenericRpcHandler:
    """Returns handlers of all methods, for `server.add_generic_rpc_handlers`.

    `servicer.Prefill` writes PrefillResponse messages or chunks that `encode_chunk` serialized.

    Args:
        rules: the servicer's methods, coroutines that write, are called for allowed peers only.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe, prefill_pb2.DescribeRequest.FromString, prefill_pb2.KvFormat.SerializeToString
        ),
        **session_handlers(servicer),
        "Prefill": grpc.unary_stream_rpc_method_handler(
            servicer.Prefill, prefill_pb2.PrefillRequest.FromString, serialize_response
        ),
    }
    if rules is not None:
        handlers = for_allowed_peers(handlers, rules)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def prefill_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[prefill_pb2.PrefillRequest, bytes]:
    """Returns the Prefill method on a channel; it yields serialized responses, for `parse_response`."""
    return channel.unary_stream(
        f"/{SERVICE}/Prefill",
        request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
        response_deserializer=None,
    )
