"""The listening port of a service: its methods, grpc.health.v1 and reflection. NOT_SERVING until told otherwise."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.tls import ServerTls

_OPTIONS = [
    *CHANNEL_OPTIONS,
    # Without this two services on one port would both start and share its connections.
    ("grpc.so_reuseport", 0),
]


class ServiceServer:
    """Add the services' handlers to `grpc` before `start`.

    Args:
        services: full names, e.g. "vitrine.encoder.v1.Encoder".
    """

    def __init__(self, *services: str) -> None:
        self.grpc = grpc.aio.server(options=_OPTIONS)
        self._health_names = ("", *services)
        self._health = health.aio.HealthServicer()
        self._local = grpc.aio.server()
        for server in (self.grpc, self._local):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)

    async def start(self, host: str, port: int, tls: ServerTls | None = None, health_socket: Path | None = None) -> str:
        """Listens, and returns "host:port" with the actual port.

        Args:
            health_socket: where the health service answers, too, for the process that started this one; it needs to
                know neither port nor certificates then.

        Raises:
            OSError: the address cannot be listened on, or a file of `tls` not be read.
        """
        shown_host = f"[{host}]" if ":" in host else host
        address = f"{shown_host}:{port}"
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
                raise OSError(f"cannot listen on {health_socket}: is its folder there?") from error
            await self._local.start()
        return f"{shown_host}:{actual_port}"

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._health_names:
            await self._health.set(name, status)

    async def set_not_serving_for_good(self) -> None:
        """Later calls of `set_serving` change nothing."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls and ends those under way after `grace_s` seconds."""
        await self.grpc.stop(grace_s)
        await self._local.stop(0)
