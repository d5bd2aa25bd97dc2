"""The listening port of a service: its methods, grpc.health.v1 and reflection; NOT_SERVING until `set_serving`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.grpc_requests import RefusingMalformed
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS, PortLimits, shown_address
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.tls import ServerTls

_MAX_STREAMS_OF_CONNECTION = 1024
# A connection without calls is closed after this time; clients open another with their next call.
_MAX_IDLE_MS = 600_000


class _PortCloses(Exception):
    """Ends a watch of the health service."""


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # untyped
    """grpc.health.v1, whose watches the server can end; they last as long as clients want otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self._watches = RunningCalls()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            with self._watches.track():
                await super().Watch(request, context)
        except _PortCloses as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    def end_watches(self) -> None:
        self._watches.end(lambda: _PortCloses("the service has ended: watch another one"))


class ServiceServer:
    """A gRPC server. Add the services' handlers to `grpc` before `start`.

    Args:
        services: full names, e.g. "vitrine.encoder.v1.Encoder".
        limits: of its connections and messages; connections are limited in all, and not by address.
        interceptors: of all calls to the port, of the health service, too; the first is called first.
    """

    def __init__(
        self,
        *services: str,
        limits: PortLimits = DEFAULT_LIMITS,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self.grpc = grpc.aio.server(options=_options(limits), interceptors=[*interceptors, RefusingMalformed()])
        self._health_names = ("", *services)
        self._health = _Health()
        self._local = grpc.aio.server()
        for server in (self.grpc, self._local):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)

    async def start(self, host: str, port: int, tls: ServerTls | None = None, health_socket: Path | None = None) -> str:
        """Starts to listen; returns "host:port" with the actual port.

        Args:
            health_socket: a Unix socket for the health service, too, so that the parent process needs neither the port
                nor certificates.

        Raises:
            OSError: the address is in use or invalid, or a file of `tls` cannot be read.
        """
        address = shown_address(host, port)
        credentials = tls.credentials() if tls else None
        try:
            if credentials is None:
                actual_port = self.grpc.add_insecure_port(address)
            else:
                actual_port = self.grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: is it in use?") from error
        await self.set_serving(False)
        await self.grpc.start()
        if health_socket is not None:
            try:
                self._local.add_insecure_port(f"unix:{health_socket}")
            except RuntimeError as error:
                raise OSError(f"cannot listen on {health_socket}: does its folder exist?") from error
            await self._local.start()
        return shown_address(host, actual_port)

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._health_names:
            await self._health.set(name, status)

    async def set_not_serving_for_good(self) -> None:
        """Sets NOT_SERVING; later calls of `set_serving` have no effect."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Closes the port, to whose calls in flight `grace_s` seconds are left; streams must have been ended before.

        New connections are refused from the beginning on, so a service calls it last.
        """
        self._health.end_watches()
        await self.grpc.stop(grace_s)
        await self._local.stop(0)


def _options(limits: PortLimits) -> list[tuple[str, int]]:
    own = {
        # Without this option two services could listen on one port and would share its connections.
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": limits.max_body_nbytes,
        # Only messages as they are (bit 0): gRPC unpacks compressed ones whole before it looks at their length. Others
        # are UNIMPLEMENTED.
        "grpc.compression_enabled_algorithms_bitset": 1,
        # Windows stay 64 KiB: else each call of a fast connection may send megabytes that nothing has asked for. What
        # is read is taken whole all the same.
        "grpc.http2.bdp_probe": 0,
        "grpc.max_concurrent_streams": _MAX_STREAMS_OF_CONNECTION,
        "grpc.max_allowed_incoming_connections": limits.max_connections,
        "grpc.server_handshake_timeout_ms": int(limits.client_timeout_s * 1000),
        "grpc.http2.settings_timeout": int(limits.client_timeout_s * 1000),
        "grpc.max_connection_idle_ms": _MAX_IDLE_MS,
    }
    return list((dict(CHANNEL_OPTIONS) | own).items())
