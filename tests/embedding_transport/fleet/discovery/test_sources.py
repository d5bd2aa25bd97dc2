"""Addresses from each kind of source, kept up to date and put together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vitrine_vlm.embedding_transport.fleet.discovery import Source, parse_sources, watch_sources
from vitrine_vlm.embedding_transport.fleet.discovery.dns import DnsSource
from vitrine_vlm.embedding_transport.fleet.discovery.file import FileSource


@asynccontextmanager
async def following(sources: list[Source]) -> AsyncIterator[list[list[str]]]:
    """The addresses reported so far."""
    shown: list[list[str]] = []
    task = asyncio.create_task(watch_sources(sources, shown.append))
    try:
        yield shown
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_fixed_addresses_and_ranges() -> None:
    async with following(parse_sources("a:1, b:22,c:8-10,[::1]:5,a:1")) as shown:
        await until(lambda: bool(shown) and len(shown[-1]) == 6)
    assert shown[-1] == ["a:1", "b:22", "c:8", "c:9", "c:10", "[::1]:5"]


async def test_a_name_stands_for_all_its_addresses_and_keeps_them_while_dns_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [["10.0.0.2", "10.0.0.1", "10.0.0.2"], socket.gaierror("down"), ["10.0.0.3", "fd00::7"]]
    asked = 0

    async def getaddrinfo(name: str, port: int, **kwargs: Any) -> list[Any]:
        nonlocal asked
        answer = answers[min(asked, len(answers) - 1)]
        asked += 1
        if isinstance(answer, Exception):
            raise answer
        assert name == "encoders.default.svc"
        return [(None, None, None, "", (host, port)) for host in answer]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with following([DnsSource("encoders.default.svc", "50051", interval_s=0.01)]) as shown:
        await until(lambda: asked > 4)
    assert shown == [["10.0.0.1:50051", "10.0.0.2:50051"], ["10.0.0.3:50051", "[fd00::7]:50051"]]


async def test_a_real_name() -> None:
    async with following(parse_sources("dns:localhost:7")) as shown:
        await until(lambda: bool(shown))
    assert "127.0.0.1:7" in shown[0]


async def test_a_file_that_changes_vanishes_breaks_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "encoders"
    sources = [*parse_sources("a:1"), FileSource(file, interval_s=0.01)]
    async with following(sources) as shown:
        await until(lambda: bool(shown))
        file.write_text("b:2\n\n# c:3\nd:4  # the last\n")
        await until(lambda: shown[-1] == ["a:1", "b:2", "d:4"])
        file.unlink()
        await asyncio.sleep(0.05)
        file.write_bytes(b"e:5 # half of a character: \xc3")
        await asyncio.sleep(0.05)
        file.write_text("d:4\n")
        await until(lambda: shown[-1] == ["a:1", "d:4"])
    assert shown == [["a:1"], ["a:1", "b:2", "d:4"], ["a:1", "d:4"]]


async def test_outside_of_a_pod_kubernetes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="needs a pod with a service account"):
        await watch_sources(parse_sources("a:1,kubernetes:default/encoders:grpc"), lambda addresses: None)
