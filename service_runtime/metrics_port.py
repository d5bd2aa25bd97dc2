"""Prometheus metrics over HTTP, on a port of their own or on another one's."""

from __future__ import annotations

from contextlib import AsyncExitStack

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from vitrine_vlm.service_runtime.tls import ServerTls

_STOP_GRACE_S = 0.5


def add_metrics(application: web.Application, registry: CollectorRegistry) -> None:
    """Adds the route `/metrics`."""

    async def metrics(http: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application.router.add_get("/metrics", metrics)


async def start_metrics_port(
    application: web.Application, host: str, port: int, tls: ServerTls | None, stack: AsyncExitStack
) -> str:
    """Serves the application until the stack is closed; returns "host:port" with the actual port.

    No key is needed here: it is for an address that only the operator reaches, or for clients with certificates.

    Raises:
        OSError: the port cannot be listened on, or a file of `tls` cannot be read.
    """
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=_STOP_GRACE_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host, port, ssl_context=tls.context() if tls else None).start()
    return f"{host}:{runner.addresses[0][1]}"
