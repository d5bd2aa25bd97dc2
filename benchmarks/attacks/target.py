"""What an attack gets: where to send to, and where it counts what came of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import aiohttp

# Another address than that of the victim.
_ATTACKER = "127.0.0.2"
_PAUSE_S = 0.5
_PIECE_NBYTES = 256 * 1024


@dataclass(frozen=True)
class Target:
    """url: of the worker or the gateway, without /v1. encoder: address of its gRPC port. model: its served name."""

    url: str
    encoder: str
    model: str
    outcomes: Counter[str] = field(default_factory=Counter)


# Prepares what it sends, and returns what attacks until it is cancelled.
Attack: TypeAlias = Callable[[Target], Callable[[], Awaitable[None]]]


def attacker_session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, local_addr=(_ATTACKER, 0))
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body at once is moved in memory with each piece that the socket takes: asyncio's, until Python 3.12."""
    for begin in range(0, len(body), _PIECE_NBYTES):
        yield body[begin : begin + _PIECE_NBYTES]


async def keep_posting(
    target: Target, path: str, make_body: Callable[[], bytes], in_flight: int, headers: dict[str, str] | None
) -> None:
    """Keeps requests in flight, each with a new body; each client waits half a second behind an answer."""

    async def client(session: aiohttp.ClientSession) -> None:
        sent = {"Content-Type": "application/json"} | (headers or {})
        while True:
            try:
                body = make_body()
                sent["Content-Length"] = str(len(body))
                async with session.post(target.url + path, data=_pieces(body), headers=sent) as response:
                    await response.read()
                    target.outcomes[f"HTTP {response.status}"] += 1
            except aiohttp.ClientError as error:
                target.outcomes[type(error).__name__] += 1
            await asyncio.sleep(_PAUSE_S)

    async with attacker_session() as session, asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(client(session))
