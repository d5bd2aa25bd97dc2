"""A gateway in a process of its own, before servers of the test and an encoder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.gateway.upstream import Upstream, serve_upstreams
from tests.integration.fleet import ServiceProcess

MAX_BODY_BYTES = 192 * 1024 * 1024


@dataclass
class Gateway:
    process: ServiceProcess
    upstreams: list[Upstream]
    client: aiohttp.ClientSession

    @property
    def upstream(self) -> Upstream:
        return self.upstreams[0]

    async def metric(self, name: str) -> float:
        """The sum of the metric's samples that begin with this name."""
        async with self.client.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.asynccontextmanager
async def start_gateway(
    encoders: str | None, flags: Sequence[str] = (), upstreams: Sequence[Upstream] = ()
) -> AsyncIterator[Gateway]:
    """Starts a gateway before these servers."""
    servers = ["--servers", ",".join(upstream.address for upstream in upstreams)] if upstreams else []
    ports = ["--port", "0", "--grpc-port", "0", "--health-interval-s", "0.2"]
    fleet = ["--encoders", encoders] if encoders else []
    process = ServiceProcess("vitrine_vlm.gateway", *servers, *fleet, *ports, *flags)
    try:
        address = (await asyncio.to_thread(process.wait_serving))["http"]
        async with aiohttp.ClientSession(f"http://{address}") as client:
            yield Gateway(process, list(upstreams), client)
    finally:
        assert await asyncio.to_thread(process.stop) == 0, process.lines


@pytest.fixture(scope="session")
def encoder(qwen3_vl_folder: Path) -> Iterator[ServiceProcess]:
    flags = ["--port", "0", "--allow-private-addresses", "--media-timeout-s", "2"]
    process = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(qwen3_vl_folder), *flags)
    process.wait_serving()
    yield process
    process.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_gateway(encoder: ServiceProcess) -> AsyncIterator[Gateway]:
    flags = ["--max-items", "4", "--tenant-header", "X-Tenant", "--max-body-bytes", str(MAX_BODY_BYTES)]
    async with (
        serve_upstreams(2) as upstreams,
        start_gateway(encoder.addresses["grpc"], flags, upstreams) as gateway,
    ):
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(module_gateway: Gateway) -> Gateway:
    """The module's gateway before two servers, which have seen nothing yet."""
    for upstream in module_gateway.upstreams:
        upstream.reset()
    return module_gateway
