"""Which server gets a request: by conversation, by load, and by what happens to the servers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.gateway.conftest import Gateway, start_gateway
from tests.gateway.upstream import serve_upstreams
from tests.integration.fleet import ServiceProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_three(encoder: ServiceProcess) -> AsyncIterator[Gateway]:
    """A gateway before three servers, of which each takes four requests."""
    async with (
        serve_upstreams(3) as upstreams,
        start_gateway(encoder.addresses["grpc"], ["--max-in-flight", "4"], upstreams) as gateway,
    ):
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def three(module_three: Gateway) -> Gateway:
    for upstream in module_three.upstreams:
        upstream.reset()
    await healthy(module_three, 3)
    return module_three


def turns(*contents: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


async def answer(gateway: Gateway, body: dict[str, Any]) -> tuple[int, Any]:
    async with gateway.client.post(CHAT, json=body) as response:
        return response.status, await response.json()


async def healthy(gateway: Gateway, number: int) -> None:
    async with asyncio.timeout(10):
        while await gateway.metric("vitrine_gateway_server_healthy") != number:
            await asyncio.sleep(0.02)


async def test_a_conversation_stays_with_its_server(three: Gateway) -> None:
    servers = Counter[str]()
    for user in range(30):
        first = ("be brief", f"question {user}")
        bodies = [turns(*first), turns(*first, "answer", "next"), turns(*first, "answer", "next", "answer", "last")]
        found = {(await answer(three, body))[1]["server"] for body in bodies}
        assert len(found) == 1
        servers.update(found)
    assert len(servers) == 3 and min(servers.values()) > 3, servers


async def test_one_conversation_does_not_fill_its_server_beyond_the_bound(three: Gateway) -> None:
    for upstream in three.upstreams:
        upstream.gate.clear()
    tasks = [asyncio.create_task(answer(three, turns("all", "the same"))) for _ in range(12)]
    async with asyncio.timeout(10):
        while sum(len(upstream.seen) for upstream in three.upstreams) < 12:
            await asyncio.sleep(0.01)
    assert [len(upstream.seen) for upstream in three.upstreams] == [4, 4, 4]
    async with three.client.post(CHAT, json=turns("one", "more")) as response:
        assert response.status == 429 and response.headers["Retry-After"] == "1"
        assert (await response.json())["error"]["code"] == "overloaded"
    for upstream in three.upstreams:
        upstream.gate.set()
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}


async def test_a_lost_server_is_left_out_and_comes_back(three: Gateway) -> None:
    first = three.upstreams[0]
    asked = [turns("s", f"question {number}") for number in range(12)]
    before = [(await answer(three, body))[1]["server"] for body in asked]
    assert first.address in before
    retries = await three.metric("vitrine_gateway_retries_total")
    await first.stop()
    during = [await answer(three, body) for body in asked]
    assert {status for status, _ in during} == {200}
    for earlier, (_, body) in zip(before, during, strict=True):
        assert body["server"] == earlier or earlier == first.address, "the others keep their conversations"
    await healthy(three, 2)
    assert await three.metric("vitrine_gateway_retries_total") <= retries + 1, "found out once"
    await first.start()
    await healthy(three, 3)
    assert [(await answer(three, body))[1]["server"] for body in asked] == before


async def test_an_unhealthy_server_gets_nothing(three: Gateway) -> None:
    three.upstreams[1].health = 500
    await healthy(three, 2)
    for number in range(10):
        assert (await answer(three, turns("s", f"question {number}")))[0] == 200
    assert not three.upstreams[1].seen
    async with three.client.get("/ready") as response:
        states = {server["address"]: server for server in (await response.json())["servers"]}
    assert states[three.upstreams[1].address]["error"] == "/health answers 500"


async def test_a_busy_server_is_passed_over(three: Gateway) -> None:
    for upstream in three.upstreams[:2]:
        upstream.statuses = [503] * 20
    for number in range(5):
        status, body = await answer(three, turns("s", f"question {number}"))
        assert (status, body["server"]) == (200, three.upstreams[2].address)
    three.upstreams[2].statuses = [429]
    for upstream in three.upstreams[:2]:
        upstream.statuses = [503]
    async with three.client.post(CHAT, json=turns("s", "no server is left")) as response:
        assert response.status in (429, 503) and response.headers["Retry-After"] == "1"


async def test_a_server_error_of_a_request_without_media_is_the_answer(three: Gateway) -> None:
    for upstream in three.upstreams:
        upstream.statuses = [500]
    assert (await answer(three, turns("s", "u")))[0] == 500
    assert sum(len(upstream.seen) for upstream in three.upstreams) == 1


async def test_a_server_that_is_lost_in_a_stream_ends_it_with_an_error(three: Gateway) -> None:
    for upstream in three.upstreams:
        upstream.gate.clear()
    async with three.client.post(CHAT, json=turns("s", "u") | {"stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await response.content.readuntil(b"\n\n")
        lost = next(upstream for upstream in three.upstreams if upstream.seen)
        await lost.stop()
        event = await response.content.readuntil(b"\n\n")
        assert b'"worker_unavailable"' in event and lost.address.encode() in event
        assert await response.read() == b""
    assert sum(len(upstream.seen) for upstream in three.upstreams) == 1, "part of it was sent already"
    await lost.start()


async def test_without_a_server_requests_say_so(encoder: ServiceProcess, tmp_path: Path) -> None:
    servers = tmp_path / "servers"
    async with serve_upstreams(1) as (upstream,):
        servers.write_text(upstream.address)
        flags = ["--servers", f"file:{servers}"]
        async with start_gateway(encoder.addresses["grpc"], flags) as gateway:
            assert (await answer(gateway, turns("s", "u")))[0] == 200
            servers.write_text("# none\n")
            async with asyncio.timeout(10):
                while (await answer(gateway, turns("s", "u")))[0] == 200:
                    await asyncio.sleep(0.05)
            async with gateway.client.post(CHAT, json=turns("s", "u")) as response:
                assert response.status == 503 and response.headers["Retry-After"] == "5"
                assert "none was found" in (await response.json())["error"]["message"]
            async with gateway.client.get("/ready") as response:
                assert response.status == 503
            servers.write_text(upstream.address)
            async with asyncio.timeout(10):
                while (await answer(gateway, turns("s", "u")))[0] != 200:
                    await asyncio.sleep(0.05)
