"""Addresses from EndpointSlices, as they change, and after errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.embedding_transport.fleet.discovery.slice_server import SliceServer
from vitrine_vlm.embedding_transport.fleet.discovery import kubernetes
from vitrine_vlm.embedding_transport.fleet.discovery.kubernetes import ApiServer, KubernetesSource


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[SliceServer, KubernetesSource]]:
    async with SliceServer.running("media") as slices:
        slices.tokens = {"first"}
        (tmp_path / "token").write_text("first\n")
        api = ApiServer(f"http://127.0.0.1:{slices.port}", tmp_path / "token", None)
        yield slices, KubernetesSource("media", "encoders", "grpc", api)


def endpoint(*hosts: str, ready: bool | None = True) -> dict[str, Any]:
    conditions = {} if ready is None else {"ready": ready, "serving": True, "terminating": not ready}
    return {"addresses": list(hosts), "conditions": conditions}


def endpoint_slice(*endpoints: dict[str, Any], port: int = 50051, kind: str = "IPv4") -> dict[str, Any]:
    ports = [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": port}]
    return {"addressType": kind, "endpoints": list(endpoints), "ports": ports}


async def test_ready_pods_of_all_slices_as_they_come_and_go(server: tuple[SliceServer, KubernetesSource]) -> None:
    slices, source = server
    others = [endpoint_slice(endpoint("10.0.0.9"))]
    first = endpoint_slice(endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False))
    slices.change({"encoders": [first], "others": others})
    async with aclosing(source.watch()) as changes, asyncio.timeout(10):
        assert await anext(changes) == ["10.0.0.1:50051"]
        following = asyncio.create_task(anext(changes))
        await until(lambda: slices.num_watches == 1)
        assert not following.done()
        now = [
            endpoint_slice(endpoint("10.0.0.1", ready=False), endpoint("10.0.0.2")),
            endpoint_slice(endpoint("fd00::3", ready=None), port=7, kind="IPv6"),
        ]
        slices.change({"encoders": now, "others": others})
        assert await following == ["10.0.0.2:50051", "[fd00::3]:7"]
        slices.change({"encoders": [{"addressType": "IPv4", "endpoints": None, "ports": None}]})
        assert await anext(changes) == []


async def test_it_goes_on_after_errors_and_with_a_new_token(
    server: tuple[SliceServer, KubernetesSource], tmp_path: Path
) -> None:
    slices, source = server
    slices.change({"encoders": [endpoint_slice(endpoint("10.0.0.1"))]})
    slices.gone = True
    async with aclosing(source.watch()) as changes, asyncio.timeout(10):
        assert await anext(changes) == ["10.0.0.1:50051"]
        assert await anext(changes) == ["10.0.0.1:50051"], "after a version that is gone all are listed again"
        slices.tokens = {"renewed"}
        following = asyncio.create_task(anext(changes))
        await asyncio.sleep(0.1)
        (tmp_path / "token").write_text("renewed\n")
        slices.change({"encoders": [endpoint_slice(endpoint("10.0.0.2"))]})
        assert await following == ["10.0.0.2:50051"]


async def test_it_goes_on_after_answers_that_are_no_lists_of_slices(
    server: tuple[SliceServer, KubernetesSource], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(kubernetes, "_MAX_BACKOFF_S", 0.01)
    slices, source = server
    slices.change({"encoders": [endpoint_slice(endpoint("10.0.0.1"))]})
    metadata = b'"metadata": {"resourceVersion": "1"}'
    slices.broken_lists = [
        *(b"", b"<html>", b"\xff", b"[]", b"null", b'{"items": []}', b'{"items": null, %s}' % metadata),
        *(b'{"items": [%s], %s}' % (item, metadata) for item in (b"7", b'{"endpoints": [{}]}', b'{"ports": 1}')),
        b'{"items": [{"endpoints": [{"addresses": [null]}]}], %s}' % metadata,
    ]
    async with aclosing(source.watch()) as changes, asyncio.timeout(10):
        assert await anext(changes) == ["10.0.0.1:50051"]
    assert not slices.broken_lists
    assert "media/encoders" in caplog.text and "items.0.endpoints.0.addresses.0" in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
