"""Prometheus metrics over HTTP, on a port of their own or on another one's."""

from __future__ import annotations

from contextlib import AsyncExitStack

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.port_limits import PortLimits, shown_address
from vitrine_vlm.service_runtime.settings import ServiceSettings
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ServerTls

_STOP_GRACE_S = 0.5
_MAX_BODY_BYTES = 64 * 1024


def add_metrics(application: web.Application, registry: CollectorRegistry) -> None:
    """Adds the route `/metrics`."""

    async def metrics(http: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application.router.add_get("/metrics", metrics)


class MetricsPort:
    """A port for an address that only the operator reaches, or for clients with certificates: no key is needed here."""

    def __init__(self, application: web.Application, limits: PortLimits) -> None:
        # Nothing here has a body.
        self._port = HttpPort(application, limits, ByteBudget(_MAX_BODY_BYTES), stop_grace_s=_STOP_GRACE_S)

    async def start(self, host: str, port: int, tls: ServerTls | None, supervisor: Supervisor) -> str:
        """Starts to listen; returns "host:port" with the actual port.

        Raises:
            OSError: the port cannot be listened on, or a file of `tls` cannot be read.
        """
        actual_port = await self._port.start(host, port, tls.context() if tls else None, supervisor)
        return shown_address(host, actual_port)

    async def close(self) -> None:
        await self._port.close()


async def start_metrics_port(
    config: ServiceSettings,
    host: str,
    application: web.Application,
    registry: CollectorRegistry,
    supervisor: Supervisor,
    stack: AsyncExitStack,
) -> str:
    """Serves `/metrics`, and what the application has besides, until the stack is closed; returns "host:port".

    Args:
        host: the address to listen on where --metrics-host names none.

    Raises:
        OSError: see `MetricsPort.start`.
    """
    add_metrics(application, registry)
    port = MetricsPort(application, config.port_limits())
    stack.push_async_callback(port.close)
    return await port.start(config.metrics_host or host, config.metrics_port, config.metrics_tls(), supervisor)
