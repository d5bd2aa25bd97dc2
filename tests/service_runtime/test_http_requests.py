"""Bodies of several clients at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_requests import LARGE_BODY_NBYTES, bodies_within, json_body
from vitrine_vlm.service_runtime.memory_file import MemoryFile
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS
from vitrine_vlm.service_runtime.running_calls import RunningCalls

NUM_CLIENTS = 4


async def test_large_bodies_take_the_event_loop_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an iteration of the loop pieces of one body are written at most, however many arrive."""
    iteration = 0
    bodies_in: dict[int, set[MemoryFile]] = defaultdict(set)
    append = MemoryFile.append

    def counted(file: MemoryFile, data: bytes) -> tuple[int, int]:
        bodies_in[iteration].add(file)
        return append(file, data)

    async def count_iterations() -> None:
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    async def handler(http: web.Request) -> web.Response:
        body = await json_body(http)
        assert isinstance(body, MemoryFile)
        with body:
            return web.Response(text=str(body.nbytes))

    monkeypatch.setattr(MemoryFile, "append", counted)
    application = web.Application(middlewares=[bodies_within(DEFAULT_LIMITS, ByteBudget(1 << 30), RunningCalls())])
    application.router.add_post("/", handler)
    counting = asyncio.create_task(count_iterations())
    async with TestClient(TestServer(application)) as client:

        async def post() -> str:
            body = bytes(3 * LARGE_BODY_NBYTES)
            async with client.post("/", data=body, headers={"Content-Type": "application/json"}) as response:
                return await response.text()

        assert await asyncio.gather(*(post() for _ in range(NUM_CLIENTS))) == [str(3 * LARGE_BODY_NBYTES)] * NUM_CLIENTS
    counting.cancel()
    assert len(set.union(*bodies_in.values())) == NUM_CLIENTS
    assert max(map(len, bodies_in.values())) == 1
