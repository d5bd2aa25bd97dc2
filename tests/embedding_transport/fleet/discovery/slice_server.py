"""A server that answers for EndpointSlices as Kubernetes' API does: lists with versions, watches, errors."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

_SELECTOR = "kubernetes.io/service-name="


class SliceServer:
    """The slices of the Services of one namespace; every change has a version of its own. Create it with `running`.

    tokens: those of the accounts that may list and watch.
    gone: whether the next watch is of a version that is too old.
    num_watches: how many were begun. broken_lists: bodies that are sent as they are, in place of the next lists.
    """

    def __init__(self) -> None:
        self.port = 0
        self.tokens: set[str] = set()
        self.gone = False
        self.num_watches = 0
        self.broken_lists: list[bytes] = []
        self._slices: dict[str, list[dict[str, Any]]] = {}
        self._version = 1
        self._changed = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def running(cls, namespace: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[SliceServer]:
        """Listens on a free `port` of 127.0.0.1."""
        server = cls()
        application = web.Application()
        application.router.add_get(f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", server._answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        server.port = runner.addresses[0][1]
        try:
            yield server
        finally:
            await runner.cleanup()

    def change(self, slices: Mapping[str, list[dict[str, Any]]]) -> None:
        """Replaces the slices of all Services, by the Services' names."""
        self._slices = dict(slices)
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"].removeprefix("Bearer ") not in self.tokens:
            raise web.HTTPUnauthorized
        selector = request.query["labelSelector"]
        assert selector.startswith(_SELECTOR), selector
        if "watch" not in request.query:
            if self.broken_lists:
                return web.Response(body=self.broken_lists.pop(0), content_type="application/json")
            version = {"resourceVersion": str(self._version)}
            items = self._slices.get(selector.removeprefix(_SELECTOR), [])
            return web.json_response({"kind": "EndpointSliceList", "metadata": version, "items": items})
        self.num_watches += 1
        if self.gone:
            self.gone = False
            raise web.HTTPGone
        response = web.StreamResponse()
        await response.prepare(request)
        if request.query["resourceVersion"] == str(self._version):
            await self._changed.wait()
        with suppress(ConnectionError):  # of a client that has left meanwhile
            await response.write(json.dumps({"type": "MODIFIED", "object": {}}).encode() + b"\n")
        return response
