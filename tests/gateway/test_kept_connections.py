"""A server that closes a connection after an answer without announcing it, as vLLM does after some errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.gateway.conftest import start_gateway
from tests.gateway.upstream import Upstream

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"


@contextlib.asynccontextmanager
async def server_of_one_answer_a_connection() -> AsyncIterator[tuple[Upstream, list[bytes]]]:
    """A second request on a connection is read and left unanswered. The list has all posts, answered or not."""
    posts: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            for may_answer in (True, False):
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"POST"):
                    posts.append(head)
                    await reader.readexactly(2)
                if may_answer:
                    writer.write(ANSWER)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Upstream(port=server.sockets[0].getsockname()[1]), posts


async def test_a_request_that_meets_a_closed_connection_is_sent_again() -> None:
    async with (
        server_of_one_answer_a_connection() as (upstream, posts),
        start_gateway(None, ["--health-interval-s", "60"], [upstream]) as gateway,
    ):
        for _ in range(3):
            async with gateway.client.post("/v1/completions", json={}) as response:
                assert response.status == 200
        # The first one met the health check's connection, and each of the others that of the one before.
        assert len(posts) == 6
        async with gateway.client.get("/ready") as response:
            assert (await response.json())["servers"][0]["healthy"]
