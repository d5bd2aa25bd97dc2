"""The listening HTTP port of a service: its application behind the limits of a port."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.connection_guard import ConnectionGuard
from vitrine_vlm.service_runtime.http_requests import bodies_within
from vitrine_vlm.service_runtime.port_limits import PortLimits, shown_address
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor

# How long a connection without a request stays open: longer than usual proxies keep theirs (60 s).
_KEEPALIVE_S = 75.0
# How long the rest of a body that nothing needs is read, so that its sender gets the answer.
_LINGERING_S = 10.0
_BACKLOG = 1024


class HttpPort:
    """An HTTP port. Handlers read bodies by `http_requests.read_body`.

    Args:
        application: its own middlewares are called between the port's: one that marks the request's connection as in
            use, and one that bounds its body.
        budget: of which bodies are a part.
        stop_grace_s: longest wait for requests in flight at `answered` and `close`, seconds.
    """

    def __init__(
        self, application: web.Application, limits: PortLimits, budget: ByteBudget, *, stop_grace_s: float
    ) -> None:
        self._limits = limits
        self._guard = ConnectionGuard(limits)
        self._reads = RunningCalls()
        self._stop_grace_s = stop_grace_s
        application.middlewares.insert(0, self._guard.middleware)
        application.middlewares.append(bodies_within(limits, budget, self._reads))
        # handler_cancellation: a request is cancelled everywhere when its client disconnects.
        # auto_decompress: a small body could become a large one.
        self._runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=stop_grace_s,
            keepalive_timeout=_KEEPALIVE_S,
            lingering_time=min(_LINGERING_S, limits.client_timeout_s),
            auto_decompress=False,
        )
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int, ssl_context: ssl.SSLContext | None, supervisor: Supervisor) -> int:
        """Starts to listen; returns the actual port.

        Args:
            supervisor: owns the loop that closes slow connections.

        Raises:
            OSError: the address is in use or invalid.
        """
        await self._runner.setup()
        assert self._runner.server is not None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._guard.wrap(self._runner.server),
                host,
                port,
                ssl=ssl_context,
                ssl_handshake_timeout=self._limits.client_timeout_s if ssl_context else None,
                backlog=_BACKLOG,
            )
        except OSError as error:  # which does not always name the port
            # Those of name resolution are negative.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise OSError(f"cannot listen on {shown_address(host, port)}: {reason}") from error
        actual_port = int(self._server.sockets[0].getsockname()[1])
        supervisor.start_task(f"connections of port {actual_port}", self._guard.watch())
        return actual_port

    async def answered(self, refusal: Callable[[], VitrineError]) -> None:
        """Waits for requests in flight. New connections are accepted, and their requests get an answer, until `close`.

        A service that drains answers 503 with Retry-After; a refused connection would not say when to retry.

        Args:
            refusal: makes the error of requests whose bodies have not arrived, at once and from now on: they would be
                refused when they are complete.
        """
        self._reads.end(refusal)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._stop_grace_s):
                await self._guard.idle()

    async def close(self) -> None:
        """Ends the connections that are open, which may take `stop_grace_s`, and then accepts no new ones."""
        await self._runner.cleanup()
        if self._server is not None:
            self._server.close()
