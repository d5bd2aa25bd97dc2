"""What a service that ships rows lets its peers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import PeerNotAllowed
from vitrine_vlm.service_runtime.grpc_requests import behaviour_of, handler_of_kind
from vitrine_vlm.service_runtime.peers import Peer, peer_of


def every_peer(peer: Peer) -> bool:
    return True


@dataclass(frozen=True)
class PeerRules:
    """Limits that depend on who a peer is.

    may_call: whether a peer may call the service. may_map: whether it may map the pools, in which it can read the rows
        of all; any other one gets its rows as bytes.
    max_sessions, max_sessions_per_peer: open sessions, in all and of one peer.
    """

    may_call: Callable[[Peer], bool] = every_peer
    may_map: Callable[[Peer], bool] = every_peer
    max_sessions: int = 1024
    max_sessions_per_peer: int = 256


def for_allowed_peers(
    handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]], rules: PeerRules
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Returns the handlers, each of which refuses peers that may not call. They are coroutines that write."""
    if rules.may_call is every_peer:
        return dict(handlers)  # who calls takes a while to find out
    return {name: _checked(handler, rules) for name, handler in handlers.items()}


def _checked(handler: grpc.RpcMethodHandler[Any, Any], rules: PeerRules) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour = behaviour_of(handler)

    async def check_and_run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        peer = peer_of(context)
        if not rules.may_call(peer):
            names = ", ".join(peer.identities) or "no name"
            await abort(context, PeerNotAllowed(f"your certificate has {names}: name it in --allowed-peers here"))
        return await behaviour(request, context)

    return handler_of_kind(handler, check_and_run, handler.request_deserializer)
