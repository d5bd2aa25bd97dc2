"""Keeps this encoder in the lists of encoders that language servers have, from the time it serves to its end.

Source: SGLang 0.5.20, `EncoderBootstrapServer` (POST /register_encoder_url, DELETE /unregister_encoder_url).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence

import aiohttp
from yarl import URL

from vitrine_vlm.embedding_transport.fleet.discovery import Source, parse_sources, watch_sources
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 5.0
# A server that was started again has an empty list.
_REPEAT_S = 10.0
_REQUEST_TIMEOUT_S = 5.0


class FixedUrl:
    """One language server, as a source of addresses."""

    def __init__(self, url: URL) -> None:
        self._url = url

    async def watch(self) -> AsyncGenerator[list[str]]:
        yield [str(self._url)]


def parse_server_sources(specs: str) -> list[Source]:
    """Reads URLs of language servers and forms of discovery, separated by commas.

    Raises:
        ValueError: one of them is neither.
    """
    sources: list[Source] = []
    for spec in filter(None, map(str.strip, specs.split(","))):
        try:
            sources += map(FixedUrl, parse_servers(spec)) if "://" in spec else parse_sources(spec)
        except ValueError as error:
            raise ValueError(f"--sglang-register: {error}") from error
    return sources


def parse_servers(specs: str) -> list[URL]:
    """Reads URLs of language servers, separated by commas.

    Raises:
        ValueError: one of them is no http: or https: URL of a host and a port.
    """
    servers = [URL(spec.strip()) for spec in specs.split(",") if spec.strip()]
    for server in servers:
        if server.scheme not in ("http", "https") or not server.raw_host or server.path not in ("", "/"):
            raise ValueError(f"{str(server)!r} is not like http://HOST:8997")
    return servers


class Registration:
    """The registration of one encoder with any number of language servers.

    Args:
        own_url: where they reach this encoder.
        sources: of their addresses, see `parse_server_sources`.
    """

    def __init__(self, own_url: str, sources: Sequence[Source]) -> None:
        self._body = {"url": own_url}
        self._sources = sources
        self._discovery: list[asyncio.Task[None]] = []
        self._keeping: dict[URL, asyncio.Task[None]] = {}

    def start(self, supervisor: Supervisor) -> None:
        """Starts the discovery, and with it a loop for each server, all of which the supervisor owns."""
        self._supervisor = supervisor
        if self._sources:
            watch = watch_sources(self._sources, self._set_servers)
            # A job, which may end by itself: fixed addresses do not change.
            self._discovery.append(supervisor.start_job("sglang discovery", watch))

    def _set_servers(self, addresses: Iterable[str]) -> None:
        servers = {URL(each if "://" in each else f"http://{each}") for each in addresses}
        for server in self._keeping.keys() - servers:  # it has ended, and its list with it
            task = self._keeping.pop(server)
            self._supervisor.expect_end(task)
            task.cancel()
        for server in servers - self._keeping.keys():
            name = f"sglang registration {server.host}:{server.port}"
            self._keeping[server] = self._supervisor.start_task(name, self._keep(server))

    async def end(self, timeout_s: float) -> None:
        """Stops the loops and removes this encoder from all lists, except those of servers that do not answer in time.

        Args:
            timeout_s: more than 0.
        """
        if self._discovery:
            await self._supervisor.stop(*self._discovery)
        servers = list(self._keeping)
        if not servers:
            return
        await self._supervisor.stop(*self._keeping.values())
        self._keeping.clear()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
            urls = [server / "unregister_encoder_url" for server in servers]
            problems = await asyncio.gather(*(self._problem(session, "DELETE", url) for url in urls))
        for server, problem in zip(servers, problems, strict=True):
            if problem:
                _log.warning("cannot unregister from language server %s: %s", server, problem)

    async def _keep(self, server: URL) -> None:
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        shown: str | None = None
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)) as session:
            while True:
                problem = await self._problem(session, "POST", server / "register_encoder_url")
                if problem != shown:
                    shown = problem
                    if problem:
                        _log.warning("cannot register with language server %s, and go on trying: %s", server, problem)
                    else:
                        _log.info("registered %s with language server %s", self._body["url"], server)
                if problem:
                    await backoff.pause()
                else:
                    backoff.reset()
                    await asyncio.sleep(_REPEAT_S)

    async def _problem(self, session: aiohttp.ClientSession, method: str, url: URL) -> str:
        """Sends a request; returns why it failed, or an empty text."""
        try:
            async with session.request(method, url, json=self._body, allow_redirects=False) as response:
                return "" if response.status == 200 else f"it answered with status {response.status}"
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            return f"{type(error).__name__}: {error}"[:200]
