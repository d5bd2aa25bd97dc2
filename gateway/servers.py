"""The servers behind a gateway: which there are, which are healthy, and which one gets a request."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import aiohttp

from vitrine_vlm.embedding_transport.fleet.content_routing import ranked
from vitrine_vlm.errors import Overloaded, WorkerUnavailable
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
# Where the server that refused does not say when.
RETRY_AFTER_S = 1
_MAX_RETRY_AFTER_S = 60.0
_WEIGHT_OF_LAST = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerStatus:
    """The current state of one server; `error` is the reason why it is not healthy."""

    address: str
    healthy: bool
    in_flight: int
    error: str | None


class Server:
    """One server. It gets requests while `error` is None; `attempted` is set after the first health check.

    name: the name that its certificate must have; None for the host of its address.
    mean_request_s: how long its last requests took, seconds.
    """

    def __init__(
        self, address: str, name: str | None, contexts: Callable[[], ssl.SSLContext] | None, health_path: str
    ) -> None:
        """
        Args:
            contexts: of `ClientTls`; None for plain HTTP.
        """
        self.address = address
        self.url = f"{'http' if contexts is None else 'https'}://{address}"
        self.name = name
        self._contexts = contexts
        self._health_path = health_path
        self.in_flight = 0
        self.mean_request_s = 0.0
        self.error: str | None = "its health was not checked yet"
        self.attempted = asyncio.Event()
        self._lost = asyncio.Event()

    @property
    def ssl_context(self) -> ssl.SSLContext | Literal[True]:
        """Of the next request: aiohttp keeps connections by their context, so that none is used with an old one."""
        return True if self._contexts is None else self._contexts()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request as in flight inside the context."""
        self.in_flight += 1
        begin = time.monotonic()
        try:
            yield
        finally:
            self.in_flight -= 1
            self.mean_request_s += _WEIGHT_OF_LAST * (time.monotonic() - begin - self.mean_request_s)

    def lost(self, reason: str) -> None:
        """A request could not be sent: none is sent any more until a health check, which follows at once, succeeds."""
        if self.error is None:
            _log.warning("server %s is lost: %s", self.address, reason)
            self.error = reason
            self._lost.set()

    async def keep_checked(self, session: aiohttp.ClientSession, interval_s: float, timeout_s: float) -> None:
        """Checks the server's health, for ever."""
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            self._lost.clear()
            error = await self._check(session, timeout_s)
            if error != self.error:
                level = logging.INFO if error is None else logging.WARNING
                _log.log(level, "server %s: %s", self.address, error or "healthy")
            self.error = error
            self.attempted.set()
            if error is None:
                backoff.reset()
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s if error is None else backoff.next_s()):
                    await self._lost.wait()

    async def _check(self, session: aiohttp.ClientSession, timeout_s: float) -> str | None:
        """Returns what is wrong, or None."""
        try:
            url = self.url + self._health_path
            get = session.get(url, allow_redirects=False, server_hostname=self.name, ssl=self.ssl_context)
            async with asyncio.timeout(timeout_s), get as response:
                return None if response.status == 200 else f"{self._health_path} answers {response.status}"
        except TimeoutError:
            return f"{self._health_path} does not answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"{self._health_path} cannot be reached: {error}"


class ServerFleet:
    """All servers. Create and use it on one event loop.

    Args:
        session: for health checks. supervisor: owns the loops that make them.
        tls: to servers; None for plain HTTP. health_path: what they are asked for their health.
        max_in_flight: requests at one server.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        supervisor: Supervisor,
        *,
        tls: ClientTls | None,
        health_path: str,
        health_interval_s: float,
        connect_timeout_s: float,
        max_in_flight: int,
    ) -> None:
        self._session = session
        self._supervisor = supervisor
        self._name = None if tls is None else tls.server_name
        self._contexts = None if tls is None else tls.contexts()
        self._health_path = health_path
        self._health_interval_s, self._connect_timeout_s = health_interval_s, connect_timeout_s
        self._max_in_flight = max_in_flight
        self._servers: dict[str, tuple[Server, asyncio.Task[None]]] = {}

    @property
    def ready(self) -> bool:
        return any(server.error is None for server in self.servers)

    @property
    def servers(self) -> list[Server]:
        return [server for server, _ in self._servers.values()]

    def status(self) -> list[ServerStatus]:
        return [ServerStatus(each.address, each.error is None, each.in_flight, each.error) for each in self.servers]

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Sends new requests to these addresses only; requests in flight at others go on."""
        for address in self._servers.keys() - set(addresses):
            _, task = self._servers.pop(address)
            self._supervisor.expect_end(task)
            task.cancel()
        for address in addresses:
            if address not in self._servers:
                server = Server(address, self._name, self._contexts, self._health_path)
                checks = server.keep_checked(self._session, self._health_interval_s, self._connect_timeout_s)
                self._servers[address] = server, self._supervisor.start_task(f"server {address} health", checks)

    async def attempted(self) -> None:
        """Waits for the first health check of each."""
        for server in self.servers:
            await server.attempted.wait()

    def choose(self, key: bytes, failures: Mapping[str, str], avoided: Collection[str] = ()) -> Server:
        """Returns the server of this conversation, or where that has too much to do, another one.

        Args:
            failures: reasons, by the addresses of servers that have failed this request.
            avoided: addresses to choose last.

        Raises:
            Overloaded: all that could be used have `max_in_flight` requests.
            WorkerUnavailable: none can be used.
        """
        usable = {each.address: each for each in self.servers if each.error is None and each.address not in failures}
        loads = {address: each.in_flight for address, each in usable.items() if each.in_flight < self._max_in_flight}
        if loads:
            return usable[ranked(key, loads, avoided)[0]]
        if usable:
            message = f"all {len(usable)} servers have {self._max_in_flight} requests: try again later"
            soonest_s = min(each.mean_request_s for each in usable.values())
            raise Overloaded(message, min(max(RETRY_AFTER_S, soonest_s), _MAX_RETRY_AFTER_S))
        reasons = {each.address: each.error for each in self.servers} | dict(failures)
        listed = "; ".join(f"server {address}: {reason}" for address, reason in reasons.items()) or "none was found"
        raise WorkerUnavailable(f"no server can be used: {listed}; start one, or wait until one is healthy")

    def has_other(self, failures: Collection[str]) -> bool:
        """Whether a server is left that has not failed."""
        return any(
            each.error is None and each.address not in failures and each.in_flight < self._max_in_flight
            for each in self.servers
        )
