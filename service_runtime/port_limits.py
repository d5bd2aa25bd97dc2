"""What a client may ask of a port before its request is looked at: sizes, times, connections."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024
MAX_BODY_BYTES = 256 * MIB
# A body, or a request in pieces, that comes more slowly is not waited for, even if a piece of it comes now and then.
LEAST_BYTES_PER_S = 64 * 1024


@dataclass(frozen=True)
class PortLimits:
    """Limits of an HTTP or gRPC port.

    max_body_nbytes: bytes of one HTTP body or gRPC message.
    client_timeout_s: seconds in which a head must be complete, the next piece of a body must come, and a reply that
        fills the buffers must be read on.
    max_connections: open connections in all; max_client_connections: of one address, and likewise its
        calls in flight over gRPC without a key.
    """

    max_body_nbytes: int = MAX_BODY_BYTES
    client_timeout_s: float = 30.0
    max_connections: int = 4096
    max_client_connections: int = 2048


DEFAULT_LIMITS = PortLimits()


def shown_address(host: str, port: int) -> str:
    """Returns "host:port", with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
