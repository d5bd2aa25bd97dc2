"""OpenAI requests on workers that die, are not ready or answer slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from aiohttp import web
from starlette.requests import Request

from tests.deploy.ray_serve.choosing import Replicas
from vitrine_vlm.deploy.ray_serve.http_forwarder import HttpForwarder


class Worker:
    """statuses: of its next answers, 0 breaks the connection; then it streams `pieces`, each once `go_on` is set."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asked: list[tuple[str, str, bytes, dict[str, str]]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs, await request.read(), dict(request.headers)))
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
        if status not in (0, 200):
            return web.json_response({"error": {"code": "some_code"}}, status=status, headers={"Retry-After": "3"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in (b"one", b"two"):
            await self.go_on.wait()
            await response.write(piece)
        return response


@contextlib.asynccontextmanager
async def serving(*workers: Worker) -> AsyncIterator[list[str]]:
    """Their addresses."""
    async with AsyncExitStack() as stack:
        addresses = []
        for worker in workers:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", worker.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            addresses.append(f"127.0.0.1:{runner.addresses[0][1]}")
        yield addresses


class Asked:
    """One request through the forwarder and what was sent back."""

    def __init__(self, path: str = "/v1/chat/completions", root_path: str = "", body: bytes = b"{}") -> None:
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": root_path,
            "query_string": b"a=b%20c",
            "headers": [(b"host", b"outside"), (b"content-type", b"application/json"), (b"traceparent", b"00-1-2-01")],
        }
        self.body = body
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []

    async def forward(self, forwarder: HttpForwarder) -> Asked:
        await forwarder.forward(Request(self.scope, self._receive), self._send)
        return self

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            self.pieces.append(message["body"])


@contextlib.asynccontextmanager
async def forwarding(replicas: Replicas, retry_s: float = 20.0) -> AsyncIterator[HttpForwarder]:
    forwarder = HttpForwarder(replicas, retry_s)  # type: ignore[arg-type]
    yield forwarder
    await forwarder.close()


async def test_request_and_answer_pass_unchanged() -> None:
    worker = Worker()
    async with serving(worker) as addresses, forwarding(Replicas(addresses)) as forwarder:
        asked = await Asked("/prefix/v1/chat/completions", "/prefix", b'{"x": 1}').forward(forwarder)
    [(method, path, body, headers)] = worker.asked
    assert (method, path, body) == ("POST", "/v1/chat/completions?a=b%20c", b'{"x": 1}')
    assert headers["Host"] == addresses[0]
    assert headers["traceparent"] == "00-1-2-01"
    assert (asked.status, b"".join(asked.pieces)) == (200, b"onetwo")
    assert asked.headers["content-type"] == "text/event-stream"
    assert "transfer-encoding" not in asked.headers


async def test_an_answer_is_sent_on_as_it_comes_and_holds_its_worker() -> None:
    worker = Worker()
    worker.go_on.clear()
    async with serving(worker) as addresses:
        replicas = Replicas(addresses)
        async with forwarding(replicas) as forwarder:
            asked = Asked()
            task = asyncio.create_task(asked.forward(forwarder))
            while not asked.status:
                await asyncio.sleep(0.01)
            assert (asked.pieces, replicas.num_held) == ([], 1)
            worker.go_on.set()
            await task
    assert (b"".join(asked.pieces), replicas.num_held) == (b"onetwo", 0)


@pytest.mark.parametrize("trouble", [0, 503])
async def test_another_worker_answers_for_one_that_cannot(trouble: int) -> None:
    bad, good = Worker(*[trouble] * 32), Worker()
    async with serving(bad, good) as addresses:
        replicas = Replicas(addresses)
        async with forwarding(replicas) as forwarder:
            for _ in range(32):
                asked = await Asked().forward(forwarder)
                assert (asked.status, b"".join(asked.pieces)) == (200, b"onetwo")
    assert bad.asked, "none went to the bad one"
    assert len(good.asked) == 32


async def test_a_request_waits_for_the_only_worker() -> None:
    async with serving(Worker(503, 0, 503)) as addresses, forwarding(Replicas(addresses)) as forwarder:
        assert (await Asked().forward(forwarder)).status == 200


@pytest.mark.parametrize(("trouble", "code"), [(0, "worker_unavailable"), (503, "some_code")])
async def test_a_request_does_not_wait_for_ever(trouble: int, code: str) -> None:
    async with serving(Worker(trouble, trouble)) as addresses, forwarding(Replicas(addresses), 0.0) as forwarder:
        asked = await Asked().forward(forwarder)
    assert asked.status == 503
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers.get("retry-after") == ("3" if trouble else None)
    assert code.encode() in b"".join(asked.pieces)


async def test_errors_of_the_request_are_passed_on_at_once() -> None:
    worker = Worker(429)
    async with serving(worker) as addresses, forwarding(Replicas(addresses)) as forwarder:
        asked = await Asked().forward(forwarder)
    assert (asked.status, asked.headers["retry-after"], len(worker.asked)) == (429, "3", 1)


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1", "/dashboards", "/dashboard/../x", "/v1/../metrics", "/v1/%2e%2e/metrics"]
)
async def test_only_paths_of_the_api_the_page_and_probes_are_forwarded(path: str) -> None:
    worker = Worker()
    async with serving(worker) as addresses, forwarding(Replicas(addresses)) as forwarder:
        asked = await Asked(path).forward(forwarder)
    assert asked.status == 404 or path.startswith("/v1/")
    assert {path for _, path, _, _ in worker.asked} <= {"/v1/%252e%252e/metrics?a=b%20c"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
async def test_a_probe_gets_the_answer_of_a_worker_at_once(path: str) -> None:
    worker = Worker(503)
    async with serving(worker) as addresses, forwarding(Replicas(addresses)) as forwarder:
        asked = await Asked(path).forward(forwarder)
        assert (asked.status, asked.headers["retry-after"]) == (503, "3")
        asked = await Asked(path).forward(forwarder)
    assert asked.status == 200
    assert [each[1] for each in worker.asked] == [f"{path}?a=b%20c"] * 2


async def test_the_page_is_on_the_port_of_a_workers_metrics() -> None:
    worker, metrics = Worker(), Worker()
    async with serving(worker, metrics) as addresses:
        replicas = Replicas(addresses[:1], metrics=addresses[1])
        async with forwarding(replicas) as forwarder:
            assert (await Asked("/dashboard").forward(forwarder)).status == 200
    assert (worker.asked, len(metrics.asked)) == ([], 1)
