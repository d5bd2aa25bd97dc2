"""Sends a request to a server, and the server's answer to the client as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from vitrine_vlm.errors import WorkerUnavailable
from vitrine_vlm.gateway.client_stream import EVENT_STREAM, ClientStream
from vitrine_vlm.gateway.first_events import read_first_events
from vitrine_vlm.gateway.headers import passed_on
from vitrine_vlm.gateway.servers import RETRY_AFTER_S, Server, ServerFleet
from vitrine_vlm.service_runtime.access_log import report_peer

_BUSY = (429, 503)
# Not sent on: the client has sent none, and aiohttp would add its own.
_SKIPPED_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


@dataclass(frozen=True)
class OutgoingRequest:
    """A request for any server.

    path: with its query, as the client has sent it. key: requests with an equal one prefer the same server.
    request_id: for logs and encoders.
    """

    method: str
    path: str
    headers: CIMultiDict[str]
    body: bytes = field(repr=False)
    key: bytes
    request_id: str


class Answer:
    """A server's answer, of which the head has come."""

    def __init__(self, server: Server, response: aiohttp.ClientResponse) -> None:
        self.server = server
        self.status = response.status
        self._response = response
        self._first_bytes = b""

    async def is_server_error(self) -> bool:
        """Whether the server says that it failed: by its status, or before the first token of a stream.

        Raises:
            WorkerUnavailable: the server was lost.
        """
        if self.status != 200 or self._response.content_type != EVENT_STREAM:
            return self.status == 500
        self._first_bytes, is_error = await read_first_events(self._read)
        return is_error

    async def send(self, client: ClientStream) -> None:
        """Sends the answer, its bytes as they come.

        Raises:
            WorkerUnavailable: the server was lost in the middle.
            ConnectionError: the client has disconnected.
        """
        headers = passed_on(self._response.headers)
        if self.status in _BUSY:
            headers.setdefault("Retry-After", str(RETRY_AFTER_S))
        await client.start(self.status, self._response.reason, headers)
        if self._first_bytes:
            await client.write(self._first_bytes)
        while data := await self._read():
            await client.write(data)

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerUnavailable(f"server {self.server.address} was lost in the middle: {error!r}") from error


class Forwarder:
    """Sends requests to servers, each to others, too, as long as nothing has come back but a refusal.

    Args:
        on_retry: called with the reason of each retry.
    """

    def __init__(self, servers: ServerFleet, session: aiohttp.ClientSession, on_retry: Callable[[str], None]) -> None:
        self._servers = servers
        self._session = session
        self._on_retry = on_retry

    def check(self, request: OutgoingRequest) -> None:
        """
        Raises:
            Overloaded, WorkerUnavailable: no server takes a request now, see `ServerFleet.choose`.
        """
        self._servers.choose(request.key, {})

    @asynccontextmanager
    async def open(self, request: OutgoingRequest, avoided: Collection[str] = ()) -> AsyncGenerator[Answer]:
        """Sends the request, and yields the answer. Leaving the context before its end cancels it at the server.

        Args:
            avoided: addresses of servers to choose last.

        Raises:
            Overloaded, WorkerUnavailable: see `ServerFleet.choose`.
        """
        failures: dict[str, str] = {}
        while True:
            server = self._servers.choose(request.key, failures, avoided)
            report_peer("server", server.address)
            with server.request():
                response = await self._send(request, server, failures)
                if response is None:
                    if self._servers.has_other(failures):
                        self._on_retry("lost")
                    continue
                async with response:
                    if response.status in _BUSY and self._servers.has_other({*failures, server.address}):
                        failures[server.address] = f"it answers {response.status}"
                        self._on_retry("busy")
                        continue
                    yield Answer(server, response)
                    return

    async def _send(
        self, request: OutgoingRequest, server: Server, failures: dict[str, str]
    ) -> aiohttp.ClientResponse | None:
        """Returns the response, or None if the server is lost.

        Raises:
            WorkerUnavailable: the server does not answer in time, or what it answers is not HTTP.
        """
        try:
            try:
                return await self._request(request, server)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as error:
                if isinstance(error, aiohttp.ClientConnectorError):
                    raise
                # vLLM closes a connection after some errors without announcing it: the next request on it meets this.
                return await self._request(request, server)
        except (aiohttp.SocketTimeoutError, aiohttp.ClientResponseError, aiohttp.ClientPayloadError) as error:
            raise WorkerUnavailable(f"server {server.address} has not answered the request: {error!r}") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            failures[server.address] = f"it is lost: {error}"
            server.lost(str(error))
            return None

    async def _request(self, request: OutgoingRequest, server: Server) -> aiohttp.ClientResponse:
        return await self._session.request(
            request.method,
            URL(server.url + request.path, encoded=True),
            headers=request.headers,
            data=request.body or None,
            allow_redirects=False,
            server_hostname=server.name,
            ssl=server.ssl_context,
            skip_auto_headers=_SKIPPED_HEADERS,
        )
