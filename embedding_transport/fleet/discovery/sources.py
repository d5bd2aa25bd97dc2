"""Parses `--encoders` into sources of addresses, and watches them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from vitrine_vlm.embedding_transport.fleet.discovery.dns import DnsSource
from vitrine_vlm.embedding_transport.fleet.discovery.file import FileSource
from vitrine_vlm.embedding_transport.fleet.discovery.kubernetes import KubernetesSource

_MAX_PORT_RANGE = 64


class Source(Protocol):
    def watch(self) -> AsyncGenerator[list[str]]:
        """Yields all addresses, "host:port", first at once and then whenever they may have changed."""
        ...


class StaticSource:
    """The address host:port, or one address for each port of host:first-last."""

    def __init__(self, spec: str) -> None:
        """Raises ValueError if `spec` has neither form."""
        match = re.fullmatch(r"(?P<host>.+):(?P<first>\d+)(-(?P<last>\d+))?", spec)
        if match is None:
            raise ValueError(f"{spec!r} is neither host:port nor host:first-last, dns:, file: or kubernetes:")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if not first <= last < first + _MAX_PORT_RANGE:
            raise ValueError(
                f"{spec!r}: the last port must be at most {_MAX_PORT_RANGE - 1} above the first, and not below it"
            )
        self._addresses = [f"{match['host']}:{port}" for port in range(first, last + 1)]

    async def watch(self) -> AsyncGenerator[list[str]]:
        yield self._addresses


def parse_sources(specs: str) -> list[Source]:
    """Parses the value of `--encoders`.

    Args:
        specs: separated by commas: host:port, host:first-last, dns:NAME:PORT, file:PATH,
            kubernetes:NAMESPACE/SERVICE:PORT, where PORT is a number or a name.

    Raises:
        ValueError: names the spec that has none of these forms.
    """
    return [_parse(spec.strip()) for spec in specs.split(",")]


async def watch_sources(sources: Sequence[Source], on_change: Callable[[list[str]], None]) -> None:
    """Calls `on_change` with the addresses of all sources, without duplicates, whenever they change; until cancelled.

    Raises:
        ValueError: a source cannot be used in this process.
    """
    latest: list[list[str] | None] = [None] * len(sources)
    shown: list[str] | None = None

    async def watch_one(index: int, source: Source) -> None:
        nonlocal shown
        async with aclosing(source.watch()) as changes:
            async for addresses in changes:
                latest[index] = addresses
                known = [each for each in latest if each is not None]
                union = list(dict.fromkeys(address for addresses in known for address in addresses))
                if union != shown:
                    shown = union
                    on_change(union)

    try:
        async with asyncio.TaskGroup() as group:
            for index, source in enumerate(sources):
                group.create_task(watch_one(index, source))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _parse(spec: str) -> Source:
    kind, _, rest = spec.partition(":")
    if kind == "dns":
        return DnsSource(*_host_and_port(spec, rest))
    if kind == "file":
        return FileSource(Path(rest))
    if kind == "kubernetes":
        name, port = _host_and_port(spec, rest)
        namespace, slash, service = name.partition("/")
        if not (namespace and slash and service):
            raise ValueError(f"{spec!r} is not kubernetes:NAMESPACE/SERVICE:PORT")
        return KubernetesSource(namespace, service, port)
    return StaticSource(spec)


def _host_and_port(spec: str, rest: str) -> tuple[str, str]:
    name, _, port = rest.rpartition(":")
    if not name or not port:
        raise ValueError(f"{spec!r} needs a name and a port, separated by a colon")
    return name, port
