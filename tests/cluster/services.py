"""Services: EndpointSlices of their pods, the names of the headless ones, and the way of users to one of the pods."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from tests.cluster.disruptions import selects
from tests.cluster.pods import Pod

_LOCALHOST = "127.0.0.1 localhost\n"


def endpoint_slice(service: dict[str, Any], pods: Sequence[Pod]) -> dict[str, Any]:
    """Returns the EndpointSlice of a Service."""
    chosen = [pod for pod in pods if selects(service, pod)]
    ports = [
        {"name": port["name"], "port": chosen[0].ports()[port["targetPort"]]}
        for port in service["spec"]["ports"]
        if chosen
    ]
    return {"addressType": "IPv4", "endpoints": [_endpoint(pod) for pod in chosen], "ports": ports}


def ready_addresses(slices: Sequence[dict[str, Any]]) -> list[str]:
    return [
        address
        for each in slices
        for endpoint in each["endpoints"]
        if endpoint["conditions"]["ready"]
        for address in endpoint["addresses"]
    ]


def write_hosts(file: Path, namespace: str, slices: dict[str, list[dict[str, Any]]]) -> None:
    """Writes the names of Services with their ready pods, in place, as containers have the file mounted."""
    lines = [
        f"{address} {name}.{namespace}.svc\n" for name, each in slices.items() for address in ready_addresses(each)
    ]
    content = "".join([_LOCALHOST, *lines]).encode()
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT), "wb") as out:
        out.write(content)
        out.truncate()


class ServiceResolver(AbstractResolver):
    """Connects users to one of a Service's ready pods, by chance, as the proxy of Services does for each connection.

    What has changed reaches it `lag_s` later, as proxies on all nodes need their time.
    """

    def __init__(self, lag_s: float) -> None:
        self._lag_s = lag_s
        self._addresses: dict[str, list[str]] = {}
        self._random = random.Random(0)

    def change(self, addresses: dict[str, list[str]]) -> None:
        """addresses: of ready pods, by the host names of Services."""
        asyncio.get_running_loop().call_later(self._lag_s, setattr, self, "_addresses", addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """
        Raises:
            OSError: the Service has no ready pod.
        """
        if not (found := self._addresses.get(host)):
            raise OSError(f"{host} has no ready pod")
        address = self._random.choice(found)
        return [ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        """Nothing is held."""


def _endpoint(pod: Pod) -> dict[str, Any]:
    conditions = {"ready": pod.is_available, "serving": pod.ready, "terminating": pod.terminating}
    return {"addresses": [pod.address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod.name}}
