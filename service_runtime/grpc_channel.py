"""The options of all gRPC connections, on both sides."""

from __future__ import annotations

import grpc

from vitrine_vlm.service_runtime.tls import ClientTls

# Of what a client sends; a server's limit is its --max-body-bytes.
_MAX_MESSAGE_BYTES = 512 * 1024 * 1024
# Of what a client receives: services send rows in chunks of 1 MiB.
_MAX_RECEIVED_BYTES = 64 * 1024 * 1024
_KEEPALIVE_MS = 10_000
# For channels and servers alike.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # EncodeRequest holds whole media files; gRPC's default limit is 4 MiB.
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A host that loses its network closes no connection. Both sides send pings, so that requests are retried elsewhere
    # and leases are released.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    # Seen with grpcio 1.85: without this option an unanswered ping times out far later than the line above states.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS),
    # An idle Connect stream carries no data: send pings all the same, and do not treat them as an attack.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    # Encoders are addressed directly; a proxy in the environment is for other hosts.
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """Returns a channel to `address`, "host:port", with TLS if `tls` is given.

    Raises:
        OSError: a file of `tls` cannot be read.
    """
    own: dict[str, int | str] = {"grpc.max_receive_message_length": _MAX_RECEIVED_BYTES}
    if tls is not None and tls.server_name is not None:
        own["grpc.ssl_target_name_override"] = tls.server_name
    options = list((dict(CHANNEL_OPTIONS) | own).items())
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)
