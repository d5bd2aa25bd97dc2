"""Closes HTTP connections whose clients are too slow, and refuses those above the limits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import web

from vitrine_vlm.service_runtime.port_limits import PortLimits

_log = logging.getLogger(__name__)
# How often connections are looked at, seconds; more often where the time-out is short.
_INTERVAL_S = 1.0


class ConnectionGuard:
    """All connections of one port. It belongs to one event loop.

    Three times are bounded: for the head of a request, from the connection's beginning or the head's first byte; for a
    reply that fills the buffers; and for what is still to be sent on a connection that is closed. Where there are too
    many connections, one that waits for a request is closed, the oldest first, before a new one is refused.
    """

    def __init__(self, limits: PortLimits, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: returns monotonic seconds.
        """
        self._limits = limits
        self._clock = clock
        self._connections: dict[asyncio.BaseTransport, GuardedConnection] = {}
        self._num_of_client: Counter[str] = Counter()
        self._num_in_request = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    async def idle(self) -> None:
        """Waits until no request is handled."""
        await self._idle.wait()

    def wrap(self, make_protocol: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """Returns a factory of protocols that this guard watches, for `create_server`."""
        return lambda: GuardedConnection(make_protocol(), self)

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Marks the connection of a request as in use, as long as it is handled."""
        connection = self._connections.get(request.transport) if request.transport is not None else None
        if connection is None:  # closed meanwhile
            return await handler(request)
        connection.head_since, connection.in_request = None, True
        self._num_in_request += 1
        self._idle.clear()
        try:
            return await handler(request)
        finally:
            connection.in_request = False
            self._num_in_request -= 1
            if not self._num_in_request:
                self._idle.set()

    async def watch(self) -> None:
        """Closes what is too slow; runs until it is cancelled."""
        while True:
            await asyncio.sleep(min(_INTERVAL_S, self._limits.client_timeout_s / 4))
            self.close_slow()

    def close_slow(self) -> int:
        """Closes the connections whose time is over; returns how many."""
        latest = self._clock() - self._limits.client_timeout_s
        slow = [each for each in self._connections.values() if each.slow_since(self._clock()) <= latest]
        for connection in slow:
            connection.transport.abort()
        if slow:
            _log.info("%d connections were closed: their clients were silent or did not read", len(slow))
        return len(slow)

    def add(self, connection: GuardedConnection) -> bool:
        """Counts a new connection; returns False where there is no room for it."""
        client, limits = connection.client, self._limits
        if self._num_of_client[client] >= limits.max_client_connections and not self._close_waiting(client):
            return False
        if len(self._connections) >= limits.max_connections and not self._close_waiting(None):
            return False
        connection.head_since = self._clock()
        self._connections[connection.transport] = connection
        self._num_of_client[client] += 1
        return True

    def remove(self, connection: GuardedConnection) -> None:
        """Counts a connection no more; one that is not counted is ignored."""
        if self._connections.pop(connection.transport, None) is not None:
            self._num_of_client[connection.client] -= 1
            if not self._num_of_client[connection.client]:
                del self._num_of_client[connection.client]

    def now(self) -> float:
        return self._clock()

    def _close_waiting(self, client: str | None) -> bool:
        """Closes the first connection, of this client, that waits for a head; returns False where none does."""
        for connection in self._connections.values():
            if not connection.in_request and client in (None, connection.client):
                self.remove(connection)
                connection.transport.abort()
                return True
        return False


class GuardedConnection(asyncio.Protocol):
    """One connection: passes everything on to the protocol that serves it.

    in_request: whether a request's handler runs. head_since: since when a head is awaited; None while none is.
    """

    def __init__(self, served: asyncio.Protocol, guard: ConnectionGuard) -> None:
        self.in_request = False
        self.head_since: float | None = None
        self.client = ""
        self._served = served
        self._guard = guard
        self._paused_since: float | None = None
        self._closing_since: float | None = None
        self._is_served = False

    def slow_since(self, now: float) -> float:
        """Since when the client has kept this connection waiting; infinity where it has not."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
        since = [each for each in (self.head_since, self._paused_since, self._closing_since) if each is not None]
        return min(since, default=float("inf"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if peer else ""
        if not self._guard.add(self):
            self.transport.abort()
            return
        self._is_served = True
        self._served.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_served:
            return
        if not self.in_request and self.head_since is None:
            self.head_since = self._guard.now()
        self._served.data_received(data)

    def eof_received(self) -> bool | None:
        return self._served.eof_received() if self._is_served else None

    def connection_lost(self, error: Exception | None) -> None:
        self._guard.remove(self)
        if self._is_served:
            self._served.connection_lost(error)

    def pause_writing(self) -> None:
        self._paused_since = self._guard.now()
        self._served.pause_writing()

    def resume_writing(self) -> None:
        self._paused_since = None
        self._served.resume_writing()
