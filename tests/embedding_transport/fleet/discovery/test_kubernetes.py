"""EndpointSlices from a server that answers as Kubernetes' API does: lists with versions, watches, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from vitrine_vlm.embedding_transport.fleet.discovery.kubernetes import ApiServer, KubernetesSource

PATH = "/apis/discovery.k8s.io/v1/namespaces/media/endpointslices"


class SliceServer:
    """The slices of one Service; every change has a version of its own."""

    def __init__(self) -> None:
        self.slices: list[dict[str, Any]] = []
        self.version = 1
        self.token = "first"
        self.num_watches = 0
        self.gone = False
        self.changed = asyncio.Event()

    def change(self, *slices: dict[str, Any]) -> None:
        self.slices = list(slices)
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] != f"Bearer {self.token}":
            raise web.HTTPUnauthorized
        assert request.query["labelSelector"] == "kubernetes.io/service-name=encoders"
        if "watch" not in request.query:
            version = {"resourceVersion": str(self.version)}
            return web.json_response({"kind": "EndpointSliceList", "metadata": version, "items": self.slices})
        self.num_watches += 1
        if self.gone:
            self.gone = False
            raise web.HTTPGone
        response = web.StreamResponse()
        await response.prepare(request)
        if request.query["resourceVersion"] == str(self.version):
            await self.changed.wait()
        await response.write(json.dumps({"type": "MODIFIED", "object": {}}).encode() + b"\n")
        return response


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[SliceServer, KubernetesSource]]:
    slices = SliceServer()
    application = web.Application()
    application.router.add_get(PATH, slices.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    (tmp_path / "token").write_text("first\n")
    api = ApiServer(f"http://127.0.0.1:{runner.addresses[0][1]}", tmp_path / "token", None)
    yield slices, KubernetesSource("media", "encoders", "grpc", api)
    await runner.cleanup()


def endpoint(*hosts: str, ready: bool | None = True) -> dict[str, Any]:
    conditions = {} if ready is None else {"ready": ready, "serving": True, "terminating": not ready}
    return {"addresses": list(hosts), "conditions": conditions}


def endpoint_slice(*endpoints: dict[str, Any], port: int = 50051, kind: str = "IPv4") -> dict[str, Any]:
    ports = [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": port}]
    return {"addressType": kind, "endpoints": list(endpoints), "ports": ports}


async def test_ready_pods_of_all_slices_as_they_come_and_go(server: tuple[SliceServer, KubernetesSource]) -> None:
    slices, source = server
    slices.change(endpoint_slice(endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False)))
    async with aclosing(source.watch()) as changes, asyncio.timeout(10):
        assert await anext(changes) == ["10.0.0.1:50051"]
        following = asyncio.create_task(anext(changes))
        await until(lambda: slices.num_watches == 1)
        assert not following.done()
        slices.change(
            endpoint_slice(endpoint("10.0.0.1", ready=False), endpoint("10.0.0.2")),
            endpoint_slice(endpoint("fd00::3", ready=None), port=7, kind="IPv6"),
        )
        assert await following == ["10.0.0.2:50051", "[fd00::3]:7"]
        slices.change({"addressType": "IPv4", "endpoints": None, "ports": None})
        assert await anext(changes) == []


async def test_it_goes_on_after_errors_and_with_a_new_token(
    server: tuple[SliceServer, KubernetesSource], tmp_path: Path
) -> None:
    slices, source = server
    slices.change(endpoint_slice(endpoint("10.0.0.1")))
    slices.gone = True
    async with aclosing(source.watch()) as changes, asyncio.timeout(10):
        assert await anext(changes) == ["10.0.0.1:50051"]
        assert await anext(changes) == ["10.0.0.1:50051"], "after a version that is gone all are listed again"
        slices.token = "renewed"
        following = asyncio.create_task(anext(changes))
        await asyncio.sleep(0.1)
        (tmp_path / "token").write_text("renewed\n")
        slices.change(endpoint_slice(endpoint("10.0.0.2")))
        assert await following == ["10.0.0.2:50051"]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
