"""A port that cannot be listened on is named in the error."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from aiohttp import web

from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.metrics_port import MetricsPort
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS
from vitrine_vlm.service_runtime.supervisor import Supervisor


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as used:
        yield int(used.getsockname()[1])


async def _start_http(host: str, port: int) -> None:
    http = HttpPort(web.Application(), DEFAULT_LIMITS, ByteBudget(1), stop_grace_s=0.1)
    try:
        await http.start(host, port, None, Supervisor())
    finally:
        await http.close()


async def test_a_port_in_use_is_named(port_in_use: int) -> None:
    with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{port_in_use}: Address already in use$"):
        await _start_http("127.0.0.1", port_in_use)
    with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{port_in_use}: Address already in use$"):
        await MetricsPort(web.Application(), DEFAULT_LIMITS).start("127.0.0.1", port_in_use, None, Supervisor())
    with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{port_in_use}: "):
        await ServiceServer().start("127.0.0.1", port_in_use)


async def test_a_host_without_address_is_named() -> None:
    with pytest.raises(OSError, match=r"^cannot listen on host\.invalid:80: Name or service not known$"):
        await _start_http("host.invalid", 80)
