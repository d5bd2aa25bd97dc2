"""Servers that are found by their pods' addresses, and have one certificate for all."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.conftest import Gateway, start_gateway
from tests.gateway.upstream import TOKENS, Upstream, serve_upstreams
from tests.service_runtime.authority import Files, authority
from vitrine_vlm.service_runtime.tls import ServerTls

NAME = "vllm.media.svc"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return authority(tmp_path / "named", NAME)


@contextlib.asynccontextmanager
async def gateway_with_certificates(files: Files) -> AsyncIterator[tuple[Upstream, Gateway]]:
    """A server that asks for certificates, and a gateway before it that shows one."""
    asks_for_certificates = ServerTls(files.cert, files.key, files.ca)
    shown = ["--server-cert-file", str(files.cert), "--server-key-file", str(files.key)]
    flags = ["--server-ca-file", str(files.ca), "--server-name", NAME, *shown]
    async with (
        serve_upstreams(1, asks_for_certificates) as upstreams,
        start_gateway(None, flags, upstreams) as gateway,
    ):
        yield upstreams[0], gateway


async def test_requests_and_health_checks_expect_the_name_and_show_a_certificate(files: Files) -> None:
    async with gateway_with_certificates(files) as (upstream, gateway):
        async with gateway.client.post("/v1/chat/completions", json=BODY) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "".join(TOKENS)
        async with gateway.client.get("/ready") as response:
            assert response.status == 200
        # Also where a request finds a server that is new under the address of an old one.
        await upstream.stop()
        await upstream.start()
        async with asyncio.timeout(5):
            while (await gateway.client.post("/v1/chat/completions", json=BODY)).status != 200:
                await asyncio.sleep(0.05)


async def test_certificates_can_be_renewed_in_place(files: Files, tmp_path: Path) -> None:
    """That of the servers, the one that they are shown, and the CA of both."""
    renewed = authority(tmp_path / "renewed", NAME)
    async with gateway_with_certificates(files) as (upstream, gateway):
        assert (await gateway.client.post("/v1/chat/completions", json=BODY)).status == 200
        for name in ("ca", "cert", "key"):
            shutil.copy(getattr(renewed, name), getattr(files, name))
        await upstream.stop()  # and with it all connections
        await upstream.start()
        async with asyncio.timeout(20):
            while (await gateway.client.post("/v1/chat/completions", json=BODY)).status != 200:
                await asyncio.sleep(0.05)
        files.cert.unlink()
        assert (await gateway.client.post("/v1/chat/completions", json=BODY)).status == 200, "partly renewed"


async def test_without_the_name_it_is_refused(files: Files) -> None:
    flags = ["--server-ca-file", str(files.ca)]
    async with (
        serve_upstreams(1, ServerTls(files.cert, files.key)) as upstreams,
        start_gateway(None, flags, upstreams) as gateway,
        gateway.client.get("/ready") as response,
    ):
        (server,) = (await response.json())["servers"]
        assert response.status == 503
        assert "certificate is not valid for" in server["error"]
        assert not upstreams[0].seen
