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

import aiohttp
from pydantic import BaseModel, Field, ValidationError

from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.tls import ClientTls

_log = logging.getLogger(__name__)
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 10.0
# The server ends a watch after this time; then all endpoints are listed again, so no missed change stays missed.
_WATCH_S = 300
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_WATCH_S + 30)


class _Port(BaseModel):
    name: str | None = None
    port: int | None = None


class _Conditions(BaseModel):
    ready: bool | None = None


class _Endpoint(BaseModel):
    addresses: list[str]
    conditions: _Conditions | None = None


class _EndpointSlice(BaseModel):
    ports: list[_Port] | None = None
    endpoints: list[_Endpoint] | None = None


class _Metadata(BaseModel):
    resource_version: str = Field(alias="resourceVersion")


class _EndpointSliceList(BaseModel):
    """What is read of the API's EndpointSliceList; optional lists may be null."""

    items: list[_EndpointSlice]
    metadata: _Metadata


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
        contexts = ClientTls(server.ca_file).contexts() if server.ca_file else None
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        async with aiohttp.ClientSession(server.url, timeout=_TIMEOUT) as session:
            while True:
                context = contexts() if contexts else None
                try:
                    listed = await self._list(session, server, context)
                    yield _addresses(listed.items, self._port)
                    backoff.reset()
                    await self._wait_for_change(session, server, context, listed.metadata.resource_version)
                # ValueError: an answer that is no list of EndpointSlices, or a file that holds no token.
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                    delay_s = backoff.next_s()
                    _log.warning(
                        "the endpoints of %s cannot be read: %r; trying again in %.1f s", self._name, error, delay_s
                    )
                    await asyncio.sleep(delay_s)

    async def _list(
        self, session: aiohttp.ClientSession, server: ApiServer, context: ssl.SSLContext | None
    ) -> _EndpointSliceList:
        """
        Raises:
            ValueError: the answer is something else.
        """
        async with session.get(self._path, params=self._selector, headers=_headers(server), ssl=context or True) as got:
            got.raise_for_status()
            body = await got.read()
        try:
            return _EndpointSliceList.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise ValueError(f"no list of EndpointSlices: {where}: {first['msg']}") from error

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


def _addresses(slices: list[_EndpointSlice], port: str) -> list[str]:
    """Returns the addresses of the ready endpoints; terminating ones are not ready."""
    found: set[str] = set()
    for each in slices:
        numbers = [entry.port for entry in each.ports or () if entry.name == port]
        number = port if port.isdecimal() else next(iter(numbers), None)
        if number is None:
            continue
        for endpoint in each.endpoints or ():
            # An unknown state counts as ready.
            if endpoint.conditions is None or endpoint.conditions.ready is not False:
                hosts = endpoint.addresses[:1]
                found |= {f"[{host}]:{number}" if ":" in host else f"{host}:{number}" for host in hosts}
    return sorted(found)
