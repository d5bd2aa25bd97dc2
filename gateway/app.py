"""Builds a gateway from its configuration and runs it until a signal asks it to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from typing import Any

import aiohttp
from aiohttp import web

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.discovery import parse_sources, watch_sources
from vitrine_vlm.embedding_transport.wire.client_calls import ClientCalls
from vitrine_vlm.embedding_transport.wire.grpc_access import GrpcAccess
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.errors import VitrineError, WorkerUnavailable
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.gateway.forwarding import Forwarder
from vitrine_vlm.gateway.http import GatewayHttp, Opened
from vitrine_vlm.gateway.media_layouts import MediaLayouts
from vitrine_vlm.gateway.metrics import GatewayMetrics
from vitrine_vlm.gateway.servers import ServerFleet
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.memory import freeze_gc, return_memory_after_peaks
from vitrine_vlm.service_runtime.metrics_port import start_metrics_port
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
_READY_POLL_S = 0.1
_STOP_GRACE_S = 0.5
# Shorter than vLLM's (VLLM_HTTP_TIMEOUT_KEEP_ALIVE, 5 s), so that no request meets a connection that is just closed.
_KEEP_ALIVE_S = 3.0


class Readiness:
    """The answer of /ready: whether requests can be served, and the state of both fleets or the reason why not.

    fleets: set once they were tried; None for encoders where requests pass with their media as they are.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.fleets: tuple[EncoderClient | None, ServerFleet] | None = None
        self._lifecycle = lifecycle

    def __call__(self) -> tuple[bool, dict[str, Any]]:
        if self._lifecycle.reason:
            return False, {"reason": self._lifecycle.reason}
        if self.fleets is None:
            return False, {"reason": "connecting"}
        encoders, servers = self.fleets
        details = {"servers": [asdict(status) for status in servers.status()]}
        if encoders is None:
            return servers.ready, details
        return encoders.ready and servers.ready, {
            "encoders": [asdict(status) for status in encoders.status()],
            **details,
        }


async def serve(config: GatewayConfig) -> None:
    """Listens, connects to encoders and servers, serves until SIGTERM or SIGINT, then drains.

    Raises:
        OSError: a port cannot be listened on.
        ValueError: a source of addresses that cannot work here.
    """
    metrics, calls = GatewayMetrics(), RunningCalls()
    access = config.make_access(metrics.registry, "vitrine_gateway", config.tenant)
    held = ByteBudget(config.max_held_bytes)
    bounds = MessageBounds(held, config.port_limits())
    limits = config.port_limits()
    interceptors = [GrpcAccess(access), ClientCalls(limits.max_client_connections), bounds]
    server = ServiceServer(limits=limits, interceptors=interceptors)
    unavailable = lambda message: WorkerUnavailable(f"the gateway {message}")  # noqa: E731
    lifecycle = Lifecycle(server, calls, unavailable, config.drain_timeout_s)
    supervisor = lifecycle.supervisor
    readiness = Readiness(lifecycle)
    http = GatewayHttp(config, metrics, readiness, calls, access)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervisor.close)
        return_memory_after_peaks(held, supervisor)
        access.start(supervisor)
        # The ports close last, so that new requests get 503 or UNAVAILABLE until then.
        port = HttpPort(http.application(), limits, held, stop_grace_s=_STOP_GRACE_S)
        stack.push_async_callback(port.close)
        tls = config.server_tls()
        http_port = await port.start(config.host, config.port, tls.context() if tls else None, supervisor)
        grpc_address = await server.start(config.host, config.grpc_port, tls, config.health_socket)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        addresses = f"http={config.host}:{http_port} grpc={grpc_address}"
        if config.metrics_port:
            address = await start_metrics_port(
                config, config.host, web.Application(), metrics.registry, supervisor, stack
            )
            addresses += f" metrics={address}"
        _log.info("LISTENING %s", addresses)

        session = await stack.enter_async_context(_session(config))
        servers = ServerFleet(
            session,
            supervisor,
            tls=config.tls_to_servers(),
            health_path=config.health_path,
            health_interval_s=config.health_interval_s,
            connect_timeout_s=config.connect_timeout_s,
            max_in_flight=config.max_in_flight,
        )
        metrics.watch_servers(servers.status)
        encoders = _encoders(config, supervisor) if config.encoders else None
        if encoders is not None:
            stack.push_async_callback(encoders.close)
            metrics.watch_encoders(encoders.stats)
        freeze_gc()
        await lifecycle.unless_ending(_discover(config, encoders, servers, lifecycle))
        layouts = MediaLayouts(encoders, supervisor) if encoders is not None else None
        if layouts is not None:
            stack.push_async_callback(layouts.close)
        http.open(Opened(Forwarder(servers, session, metrics.retried), layouts))
        readiness.fleets = encoders, servers
        supervisor.start_task("health", _keep_health(server, lambda: readiness()[0]))
        if not lifecycle.is_ending:
            _log.info("SERVING %s with %s", config.servers, config.encoders or "their own encoders")

        await lifecycle.ending()
        await lifecycle.drain()
        await port.answered(lifecycle.refusal)
        lifecycle.raise_failure()
    _log.info("stopped")


def _encoders(config: GatewayConfig, supervisor: Supervisor) -> EncoderClient:
    return EncoderClient(
        [],
        None,
        transport="grpc",  # no rows come here
        connect_timeout_s=config.connect_timeout_s,
        encode_timeout_s=config.encode_timeout_s,
        tls=config.encoder_tls(),
        supervisor=supervisor,
    )


def _session(config: GatewayConfig) -> aiohttp.ClientSession:
    """Connections to servers, which pass on bodies as they are."""
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=config.connect_timeout_s, sock_read=config.server_timeout_s
    )
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


async def _discover(
    config: GatewayConfig, encoders: EncoderClient | None, servers: ServerFleet, lifecycle: Lifecycle
) -> None:
    """Keeps both fleets' addresses up to date; returns once some of each are known and tried, or after a while.

    Raises:
        ValueError: a source of addresses that cannot work here.
    """
    supervisor = lifecycle.supervisor

    async def watch(name: str, specs: str, use: Callable[[list[str]], None]) -> None:
        found = asyncio.Event()

        def use_and_set(addresses: list[str]) -> None:
            use(addresses)
            found.set()

        # A job, which may end by itself: fixed addresses do not change.
        supervisor.start_job(f"discovery of {name}", watch_sources(parse_sources(specs), use_and_set))
        await found.wait()

    async def watch_all() -> None:
        watches = [watch("servers", config.servers, servers.set_addresses)]
        if encoders is not None:
            watches.append(watch("encoders", config.encoders, encoders.set_addresses))
        await asyncio.gather(*watches)
        if encoders is not None:
            # It runs on without any: they may come. /ready has the reason.
            with suppress(VitrineError):
                await encoders.start()
        await servers.attempted()

    with suppress(TimeoutError):
        async with asyncio.timeout(2 * config.connect_timeout_s):
            await supervisor.unless_failed(watch_all())


async def _keep_health(server: ServiceServer, is_ready: Callable[[], bool]) -> None:
    """Keeps the status in grpc.health.v1 equal to that of /ready."""
    shown: bool | None = None
    while True:
        ready = is_ready()
        if ready != shown:
            shown = ready
            await server.set_serving(ready)
        await asyncio.sleep(_READY_POLL_S)
