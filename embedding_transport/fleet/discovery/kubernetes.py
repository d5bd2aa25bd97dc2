"""The ready pods behind a Service, from Kubernetes' EndpointSlices.

Needs a service account that may list and watch endpointslices of discovery.k8s.io in the namespace.

Source: Kubernetes API reference, discovery.k8s.io/v1 EndpointSlice; "Accessing the API from within a Pod".
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from vitrine_vlm.service_runtime.backoff import Backoff

_log = logging.getLogger(__name__)
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 10.0
# The server ends a watch after this time; then all endpoints are listed again, so no missed change stays missed.
_WATCH_S = 300
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_WATCH_S + 30)


@dataclass(frozen=True)
class ApiServer:
    """How to reach the Kubernetes API.

    url: without a path.
    token_file: read for every request, because the kubelet renews it.
    ca_file: the CA of the server's certificate.
    """

    url: str
    token_file: Path
    ca_file: Path | None

    @classmethod
    def of_this_pod(cls) -> ApiServer:
        """Returns the API server that Kubernetes announces to this pod.

        Raises:
            ValueError: this process does not run in a pod, or the pod has no service account.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        token_file = _ACCOUNT / "token"
        if not host or not port or not token_file.exists():
            raise ValueError(
                f"kubernetes: needs a pod with a service account; KUBERNETES_SERVICE_HOST is {host!r} and {token_file} "
                f"{'exists' if token_file.exists() else 'does not exist'}"
            )
        shown_host = f"[{host}]" if ":" in host else host
        return cls(f"https://{shown_host}:{port}", token_file, _ACCOUNT / "ca.crt")


class KubernetesSource:
    def __init__(self, namespace: str, service: str, port: str, server: ApiServer | None = None) -> None:
        """
        Args:
            port: a number, or the port's name in the Service.
            server: None for the API server of the pod that this process runs in.
        """
        self._name, self._port, self._server = f"{namespace}/{service}", port, server
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selector = {"labelSelector": f"kubernetes.io/service-name={service}"}

    async def watch(self) -> AsyncGenerator[list[str]]:
        """Raises ValueError outside of a pod."""
        server = self._server if self._server is not None else ApiServer.of_this_pod()
        context = ssl.create_default_context(cafile=server.ca_file) if server.ca_file else None
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        async with aiohttp.ClientSession(server.url, timeout=_TIMEOUT) as session:
            while True:
                try:
                    listed = await self._list(session, server, context)
                    yield _addresses(listed["items"], self._port)
                    backoff.reset()
                    await self._wait_for_change(session, server, context, listed["metadata"]["resourceVersion"])
                except (aiohttp.ClientError, TimeoutError, OSError, KeyError) as error:
                    delay_s = backoff.next_s()
                    _log.warning(
                        "the endpoints of %s cannot be read: %r; trying again in %.1f s", self._name, error, delay_s
                    )
                    await asyncio.sleep(delay_s)

    async def _list(
        self, session: aiohttp.ClientSession, server: ApiServer, context: ssl.SSLContext | None
    ) -> dict[str, Any]:
        async with session.get(self._path, params=self._selector, headers=_headers(server), ssl=context or True) as got:
            got.raise_for_status()
            listed: dict[str, Any] = await got.json()
            return listed

    async def _wait_for_change(
        self, session: aiohttp.ClientSession, server: ApiServer, context: ssl.SSLContext | None, version: str
    ) -> None:
        """Returns at the first event after `version`, or when the server ends the watch."""
        params = self._selector | {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(_WATCH_S)}
        async with session.get(self._path, params=params, headers=_headers(server), ssl=context or True) as got:
            if got.status != 410:  # Gone: the server no longer keeps events that old
                got.raise_for_status()
                await got.content.readany()  # the content does not matter: all endpoints are listed again


def _headers(server: ApiServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.token_file.read_text().strip()}", "Accept": "application/json"}


def _addresses(slices: list[dict[str, Any]], port: str) -> list[str]:
    """Returns the addresses of the ready endpoints; terminating ones are not ready."""
    found: set[str] = set()
    for each in slices:
        numbers = [entry["port"] for entry in each.get("ports") or () if entry.get("name") == port]
        number = port if port.isdecimal() else next(iter(numbers), None)
        if number is None:
            continue
        for endpoint in each.get("endpoints") or ():
            # An unknown state counts as ready.
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                hosts = endpoint["addresses"]
                found |= {f"[{host}]:{number}" if ":" in host else f"{host}:{number}" for host in hosts[:1]}
    return sorted(found)
