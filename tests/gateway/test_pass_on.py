"""What has no media passes through as it is, in both directions; what is no request is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests.gateway.conftest import Gateway
from tests.gateway.upstream import TOKENS

pytestmark = pytest.mark.asyncio(loop_scope="module")
JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
# What json.loads and json.dumps would change: white space, numbers, escapes, order, a field unknown to vLLM.
BODY = '{ "model" : "m","temperature":1.0e-1, "seed": 12345678901234567890, "x": "\\u00e9é",\n "messages":[%s],"p":1.0}'


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


async def test_a_body_without_media_passes_byte_by_byte(gateway: Gateway) -> None:
    body = (BODY % '{"role": "user", "content": "hi"}').encode()
    async with gateway.client.post(CHAT, data=body, headers=JSON) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"] == "".join(TOKENS)
    seen = [each for upstream in gateway.upstreams for each in upstream.seen]
    assert [each.raw for each in seen] == [body]


async def test_other_paths_pass_with_method_query_and_headers(gateway: Gateway) -> None:
    headers = {
        "Authorization": "Bearer key",
        "X-Own": "a",
        "Proxy-Authorization": "secret",
        "Connection": "x-hop",
        "X-Hop": "1",
    }
    for method, path in (("GET", "/v1/models?a=%2F"), ("POST", "/v1/responses"), ("DELETE", "/v1/responses/resp_1")):
        async with gateway.client.request(
            method, URL(path, encoded=True), headers=headers, data=b"\0\1" if method == "POST" else None
        ) as got:
            assert (await got.json())["path"] == path
            assert got.headers["X-Server"] and got.headers["Set-Cookie"] == "a=b"
            assert "Keep-Alive" not in got.headers
    seen = [each for upstream in gateway.upstreams for each in upstream.seen]
    assert len(seen) == 3
    for each in seen:
        assert (each.headers["Authorization"], each.headers["X-Own"]) == ("Bearer key", "a")
        assert not {"Proxy-Authorization", "X-Hop"} & set(each.headers)


async def test_what_is_not_below_v1_is_not_passed(gateway: Gateway) -> None:
    host, port = gateway.process.addresses["http"].split(":")
    for path in (
        "/sleep",
        "/v1/../sleep",
        "/v1/%2e%2e/sleep",
        "/v1/x/%2E%2E/%2e./sleep",
        "//evil/v1/models",
        "/v1/..%2Fsleep",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))  # as aiohttp's client would tidy the path up
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = int((await reader.readline()).split()[1])
        writer.close()
        assert status in (400, 404), path
    assert not any(upstream.seen for upstream in gateway.upstreams)


async def test_bytes_that_are_not_utf8_fail_no_request_of_others(gateway: Gateway) -> None:
    host, port = gateway.process.addresses["http"].split(":")
    body = b'{"messages": []}'
    for path, headers, status in (
        (b"/v1/\xff\xfe", b"", 400),
        (b"/v1/models?a=\xff", b"", 400),
        (b"/v1/models", b"X-Own: \xff\r\nX-Request-Id: \xfe\r\n", 200),
        (b"/v1/models", b"X-Request-Id: " + b"a" * 4000 + b"\r\n", 200),
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 16\r\n" + headers)
        writer.write(b"\r\n" + body)
        assert int((await reader.readline()).split()[1]) == status, (path, headers)
        writer.close()
    seen = [each for upstream in gateway.upstreams for each in upstream.seen]
    assert len(seen) == 2 and not any("X-Own" in each.headers for each in seen)


async def test_an_absolute_address_in_the_request_line_is_not_called(gateway: Gateway) -> None:
    host, port = gateway.process.addresses["http"].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET http://192.0.2.1/v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b"200 OK" in answer.splitlines()[0]
    assert [each.path for upstream in gateway.upstreams for each in upstream.seen] == ["/v1/models"]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_is_passed_on_as_it_comes(gateway: Gateway, n: int) -> None:
    for upstream in gateway.upstreams:
        upstream.gate.clear()
    body = {"messages": [message("hi")], "stream": True, "n": n}
    async with gateway.client.post(CHAT, json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        async with asyncio.timeout(5):
            for _ in range(2 * n):  # the role and the first token of each come while the server waits
                assert (await response.content.readuntil(b"\n\n")).startswith(b"data: {")
        for upstream in gateway.upstreams:
            upstream.gate.set()
        rest = (await response.read()).decode()
    assert rest.count("data: ") == 2 * n + 1 and rest.endswith("data: [DONE]\n\n")


async def test_a_client_that_disconnects_ends_the_request_at_the_server(gateway: Gateway) -> None:
    for upstream in gateway.upstreams:
        upstream.gate.clear()
    for stream in (True, False):
        before = sum(upstream.num_cancelled for upstream in gateway.upstreams)
        task = asyncio.create_task(
            gateway.client.post(CHAT, json={"messages": [message("hi")], "stream": stream}).__aenter__()
        )
        while not any(upstream.seen for upstream in gateway.upstreams):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        if stream:
            (await task).close()
        else:
            task.cancel()
        async with asyncio.timeout(5):
            while sum(upstream.num_cancelled for upstream in gateway.upstreams) == before:
                await asyncio.sleep(0.01)
        for upstream in gateway.upstreams:
            upstream.seen.clear()
    assert await gateway.metric("vitrine_gateway_server_in_flight") == 0


def nested(depth: int) -> bytes:
    return b'{"messages":' + b"[" * depth + b"]" * depth + b"}"


HOSTILE = {
    "empty": b"",
    "not JSON": b"hello",
    "cut off": b'{"messages": [{"role": "user", "content": [{"type": "image_url"',
    "an array": b"[]",
    "deep": nested(100_000),
    "deep in a part": b'{"messages":[{"content":[{"type":' + b'{"a":' * 100_000,
    "not UTF-8": b'{"messages": "\xff"}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "a trailing comma": b'{"messages": [],}',
    "two values": b'{"messages": []} {}',
    "twice": b'{"messages": [], "messages": [{"role": "user"}]}',
    "a long number": b'{"messages": [], "x": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_not_json_is_refused(gateway: Gateway, name: str) -> None:
    async with gateway.client.post(CHAT, data=HOSTILE[name], headers=JSON) as response:
        assert response.status == 400, await response.text()
        assert (await response.json())["error"]["code"] == "invalid_request"
    assert not any(upstream.seen for upstream in gateway.upstreams)


async def test_other_types_and_compressed_bodies_are_refused(gateway: Gateway) -> None:
    body = json.dumps({"messages": []}).encode()
    for headers, status in (({"Content-Type": "text/plain"}, 400), (JSON | {"Content-Encoding": "br"}, 415)):
        async with gateway.client.post(CHAT, data=body, headers=headers) as response:
            assert response.status == status, headers


async def test_a_body_over_the_limit_is_refused(gateway: Gateway) -> None:
    async with aiohttp.ClientSession(f"http://{gateway.process.addresses['http']}") as client:
        body = b'{"messages": [{"role": "user", "content": "' + b"a" * (193 * 1024 * 1024) + b'"}]}'
        try:
            async with client.post(CHAT, data=body, headers=JSON) as response:
                assert response.status == 413
        except aiohttp.ClientOSError:  # it stops to read
            pass
    assert not any(upstream.seen for upstream in gateway.upstreams)


async def test_a_body_of_100_mb_passes(gateway: Gateway) -> None:
    body = b'{"messages": [{"role": "user", "content": "' + b"a" * 100_000_000 + b'"}]}'
    async with gateway.client.post(CHAT, data=body, headers=JSON) as response:
        assert response.status == 200
    assert [each.raw == body for upstream in gateway.upstreams for each in upstream.seen] == [True]


async def test_what_vllm_refuses_is_left_to_vllm(gateway: Gateway) -> None:
    for body in ({"messages": 5}, {"messages": None}, {}):
        async with gateway.client.post(CHAT, json=body) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (400, "BadRequestError"), body
    assert sum(len(upstream.seen) for upstream in gateway.upstreams) == 3


async def test_probes_and_metrics(gateway: Gateway) -> None:
    async with gateway.client.get("/health") as response:
        assert response.status == 200
    async with gateway.client.get("/ready") as response:
        details = await response.json()
        assert response.status == 200 and details["ready"]
    assert [server["healthy"] for server in details["servers"]] == [True, True]
    assert [encoder["ready"] for encoder in details["encoders"]] == [True]
    assert await gateway.metric("vitrine_gateway_server_healthy") == 2
    before = await gateway.metric('vitrine_gateway_requests_total{outcome="ok"}')
    async with gateway.client.post(CHAT, json={"messages": [message("hi")]}) as response:
        await response.read()
    assert await gateway.metric('vitrine_gateway_requests_total{outcome="ok"}') == before + 1
