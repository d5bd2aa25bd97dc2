"""Slow clients and too many of them: over real sockets, with short time-outs."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientConnectorError, ClientError, ClientSession, web

from vitrine_vlm.errors import VitrineError, WorkerUnavailable
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_errors import errors_as_openai
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.http_requests import read_body
from vitrine_vlm.service_runtime.port_limits import PortLimits
from vitrine_vlm.service_runtime.supervisor import Supervisor

TIMEOUT_S = 0.4
HALF_A_HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
HALF_A_BODY = HALF_A_HEAD + b"Content-Length: 9\r\n\r\nab"
LIMITS = PortLimits(max_body_nbytes=4 << 20, client_timeout_s=TIMEOUT_S, max_connections=40, max_client_connections=20)


class Served:
    """A port on all loopback addresses, whose handlers count the bytes that they have."""

    def __init__(self, limits: PortLimits, budget: ByteBudget) -> None:
        self.budget = budget
        self.ended: list[str] = []
        self.gate = asyncio.Event()
        application = web.Application(middlewares=[errors_as_openai])
        application.router.add_post("/echo", self._echo)
        application.router.add_post("/keep", self._keep)
        application.router.add_get("/stream", self._stream)
        application.router.add_get("/large", self._large)
        self.http = HttpPort(application, limits, budget, stop_grace_s=0.1)
        self._supervisor = Supervisor()

    async def __aenter__(self) -> Served:
        self.port = await self.http.start("0.0.0.0", 0, None, self._supervisor)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.http.close()
        await self._supervisor.close()

    async def _echo(self, http: web.Request) -> web.Response:
        return web.json_response({"nbytes": len(await read_body(http))})

    async def _keep(self, http: web.Request) -> web.Response:
        await read_body(http)
        await self.gate.wait()
        return web.Response()

    async def _stream(self, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(http)
        try:
            while True:
                await response.write(b"a" * 65536)
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise

    async def _large(self, http: web.Request) -> web.Response:
        return web.Response(body=b"a" * (32 << 20))


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served(LIMITS, ByteBudget(24 << 20)) as served:
        yield served


@asynccontextmanager
async def connected(served: Served, data: bytes = b"", host: str = "127.0.0.2") -> AsyncIterator[asyncio.StreamReader]:
    """A connection from another address than that of the other clients; what it reads is limited."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.bind((host, 0))
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        writer.write(data)
        yield reader
    finally:
        writer.transport.abort()


async def echo(served: Served, body: bytes = b"abc", **headers: str) -> tuple[int, str]:
    async with (
        ClientSession() as session,
        session.post(f"http://127.0.0.1:{served.port}/echo", data=body, headers=headers) as response,
    ):
        return response.status, await response.text()


@pytest.mark.parametrize("data", [b"", HALF_A_HEAD, HALF_A_BODY])
async def test_what_is_half_sent_ends(served: Served, data: bytes) -> None:
    begin = time.monotonic()
    async with connected(served, data) as reader:
        answer = await asyncio.wait_for(reader.read(), 10)
    assert TIMEOUT_S <= time.monotonic() - begin < 5
    assert (b" 408 " in answer) == (b"\r\n\r\n" in data)


async def test_a_head_that_trickles_ends(served: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    with pytest.raises(ConnectionError):
        for _ in range(200):
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(TIMEOUT_S / 10)
    writer.close()


async def test_a_connection_without_a_request_stays(served: Served) -> None:
    request = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    for _ in range(3):
        writer.write(request)
        assert b"200" in await reader.readline()
        assert await reader.readuntil(b'{"nbytes": 0}')
        await asyncio.sleep(3 * TIMEOUT_S)
    writer.close()


async def test_half_sent_heads_stop_no_other_client(served: Served) -> None:
    """More than the limits: those that wait longest make room, also for the attacker's own address."""
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(10):

        async def attack() -> None:
            async with connected(served, HALF_A_HEAD) as reader:
                await reader.read()

        attacks = [tasks.create_task(attack()) for _ in range(100)]
        await asyncio.sleep(0.1)
        for _ in range(5):
            assert (await echo(served))[0] == 200
        assert sum(not each.done() for each in attacks) <= LIMITS.max_client_connections


async def test_connections_with_requests_are_refused_above_the_limit(served: Served) -> None:
    url = f"http://127.0.0.1:{served.port}/keep"
    async with ClientSession() as session:
        kept = [asyncio.create_task(session.post(url, data=b"a")) for _ in range(LIMITS.max_client_connections)]
        await asyncio.sleep(0.3)
        with pytest.raises(ClientError):
            await echo(served)
        async with connected(served, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n") as reader:
            assert b"200" in await reader.readline()
        served.gate.set()
        assert {(await each).status for each in kept} == {200}


@pytest.mark.parametrize("path", ["stream", "large"])
async def test_a_reply_that_is_not_read_ends(served: Served, path: str) -> None:
    async with connected(served, f"GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()):
        await asyncio.sleep(TIMEOUT_S / 2)
        assert len(served.http._guard) == 1
        async with asyncio.timeout(10):
            while len(served.http._guard):
                await asyncio.sleep(0.05)
            while path == "stream" and not served.ended:
                await asyncio.sleep(0.05)


async def test_a_reply_that_is_read_slowly_goes_on(served: Served) -> None:
    async with connected(served, b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n") as reader:
        begin = time.monotonic()
        while time.monotonic() - begin < 4 * TIMEOUT_S:
            assert await reader.read(1 << 20)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, identity"])
async def test_compressed_bodies_are_refused(served: Served, encoding: str) -> None:
    status, text = await echo(served, gzip.compress(b"0" * (3 << 20)), **{"Content-Encoding": encoding})
    assert status == 415 and "compressed" in text and served.budget.reserved_nbytes == 0


async def test_large_bodies_are_refused_before_they_are_read(served: Served) -> None:
    for length, status in ((LIMITS.max_body_nbytes + 1, b" 413 "), (LIMITS.max_body_nbytes, b" 408 ")):
        head = f"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()
        async with connected(served, head) as reader:
            assert status in await reader.readline()


async def test_chunked_bodies_are_refused_where_they_pass_the_limit(served: Served) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"a" * (1 << 20)

    async with ClientSession() as session:
        try:
            async with session.post(f"http://127.0.0.1:{served.port}/echo", data=pieces()) as response:
                assert response.status == 413
        except OSError:  # the port stops to read
            pass
    assert served.budget.reserved_nbytes == 0


async def test_bodies_of_all_requests_share_the_budget() -> None:
    """24 MiB, of which 21 for large ones, are one body of 4 MiB, counted three times, and some of a second one."""
    large = b"a" * (4 << 20)
    async with Served(PortLimits(max_body_nbytes=4 << 20), ByteBudget(24 << 20)) as served, ClientSession() as session:
        kept = asyncio.create_task(session.post(f"http://127.0.0.1:{served.port}/keep", data=large))
        while served.budget.reserved_nbytes < 3 * len(large):
            await asyncio.sleep(0.01)
        status, text = await echo(served, large)
        assert status == 429 and "--max-held-bytes" in text
        assert (await echo(served, b"small"))[0] == 200
        served.gate.set()
        assert (await kept).status == 200
        assert (await echo(served, large))[0] == 200
        assert served.budget.reserved_nbytes == 0


async def test_a_body_that_has_not_arrived_when_the_service_ends_gets_an_answer(served: Served) -> None:
    def refusal() -> VitrineError:
        return WorkerUnavailable("the worker is shutting down")

    async with connected(served, HALF_A_BODY) as reader:
        while not served.budget.reserved_nbytes:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(served.http.answered(refusal), TIMEOUT_S / 2)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S / 2)
        assert b" 503 " in head and b"Retry-After: " in head and b"Connection: close" in head
    assert (await echo(served))[0] == 503


async def test_a_port_accepts_connections_until_it_is_closed() -> None:
    release = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response(text="answered")

    async def refused(request: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable(headers={"Retry-After": "5"})

    application = web.Application()
    application.router.add_get("/slow", slow)
    application.router.add_get("/refused", refused)
    supervisor = Supervisor()
    port = HttpPort(application, LIMITS, ByteBudget(1 << 20), stop_grace_s=5.0)
    url = f"http://127.0.0.1:{await port.start('127.0.0.1', 0, None, supervisor)}"

    async def status(path: str) -> int:
        async with ClientSession() as session, session.get(url + path) as response:
            return response.status

    try:
        in_flight = asyncio.create_task(status("/slow"))
        await asyncio.sleep(0.1)
        answered = asyncio.create_task(port.answered(lambda: WorkerUnavailable("ending")))
        assert await status("/refused") == 503
        assert not answered.done()
        release.set()
        assert await in_flight == 200
        await answered
        assert await status("/refused") == 503
    finally:
        await port.close()
        await supervisor.close()
    with pytest.raises(ClientConnectorError):
        await status("/refused")
