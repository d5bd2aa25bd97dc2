"""The HTTP port: the OpenAI API of the servers behind it, probes and metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from vitrine_vlm.errors import BadRequest, WorkerUnavailable
from vitrine_vlm.gateway import body_process
from vitrine_vlm.gateway.client_stream import ClientStream
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.gateway.forwarding import Forwarder, OutgoingRequest
from vitrine_vlm.gateway.headers import passed_on
from vitrine_vlm.gateway.media_layouts import MediaLayouts
from vitrine_vlm.gateway.media_parts import ChatBody, parse_chat
from vitrine_vlm.gateway.metrics import GatewayMetrics
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.api_keys import take_media
from vitrine_vlm.service_runtime.body_process import Kept
from vitrine_vlm.service_runtime.body_reader import BodyReader
from vitrine_vlm.service_runtime.http_access import add_access
from vitrine_vlm.service_runtime.http_errors import errors_as_openai
from vitrine_vlm.service_runtime.http_requests import json_body, read_body, traced
from vitrine_vlm.service_runtime.logs import set_request_id
from vitrine_vlm.service_runtime.metrics_port import add_metrics
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.tenants import CacheScope, current_tenant
from vitrine_vlm.service_runtime.traces import outgoing_metadata

_CHAT = "/v1/chat/completions"
# In what servers get: workers are started with it as their --tenant-header.
_TENANT_HEADER = "X-Vitrine-Tenant"
# Requests that are passed on unparsed prefer a server by how their body begins.
_AFFINITY_NBYTES = 1024
_SMALL_BODY_BYTES = 16 * 1024
_MAX_ID_LENGTH = 256


@dataclass(frozen=True)
class Opened:
    """What requests need. layouts: None where requests pass with their media as they are."""

    forwarder: Forwarder
    layouts: MediaLayouts | None


class GatewayHttp:
    """Handlers of the gateway's HTTP port. `open` is called once encoders and servers were tried."""

    def __init__(
        self,
        config: GatewayConfig,
        metrics: GatewayMetrics,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        calls: RunningCalls,
        access: Access,
    ) -> None:
        self._config = config
        self._access = access
        self._metrics = metrics
        self._readiness = readiness
        self._calls = calls
        self._opened: Opened | None = None
        self._body_reader = BodyReader(body_process.__name__)

    def open(self, opened: Opened) -> None:
        self._opened = opened

    def application(self) -> web.Application:
        app = web.Application(middlewares=[traced, errors_as_openai])
        app.router.add_post(_CHAT, self._chat)
        app.router.add_route("*", "/v1/{path:.*}", self._other)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        if not self._config.metrics_port:
            add_metrics(app, self._metrics.registry)
        add_access(app, self._access)
        self._body_reader.end_with(app)
        return app

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        chat, body = await self._read_chat(http)
        take_media(sum(part.item.nbytes for part in chat.parts))
        if not self._replaces(chat):
            return await self._serve(
                http, partial(self._forward, _request(http, body, chat.affinity_key, self._access))
            )
        request = _request(http, b"", chat.affinity_key, self._access)
        scope = CacheScope(current_tenant(), chat.cache_salt)
        return await self._serve(http, partial(self._forward_with_layouts, request, chat, scope.encoder_tenant))

    async def _read_chat(self, http: web.Request) -> tuple[ChatBody, bytes]:
        """Returns what the body has, and the body itself where it is sent as it is."""
        body = await json_body(http)
        options: dict[str, Any] = {"max_items": self._config.max_items, "several_tenants": self._access.has_tenants}
        if isinstance(body, bytes):
            read = partial(parse_chat, body, **options)
            # A large one takes long, and other requests and probes are answered meanwhile.
            return await asyncio.to_thread(read) if len(body) > _SMALL_BODY_BYTES else read(), body

        def use(found: Any, kept: Kept) -> tuple[ChatBody, bytes]:
            chat = ChatBody.from_json(found, kept)
            return chat, b"" if self._replaces(chat) else body.read()

        return await self._body_reader.read(http, body, options, use)

    def _replaces(self, chat: ChatBody) -> bool:
        """Whether servers get layouts in the place of the chat's media."""
        return bool(chat.parts and self._config.encoders)

    async def _other(self, http: web.Request) -> web.StreamResponse:
        if http.method == "POST" and unquote(http.rel_url.raw_path) == _CHAT:  # the same to a server
            return await self._chat(http)
        body = await read_body(http)
        return await self._serve(
            http, partial(self._forward, _request(http, body, body[:_AFFINITY_NBYTES], self._access))
        )

    async def _serve(
        self, http: web.Request, work: Callable[[ClientStream, Opened], Awaitable[None]]
    ) -> web.StreamResponse:
        """Tracks one request. Errors that come once the answer has begun end it; all others are raised."""
        client = ClientStream(http)
        try:
            with self._metrics.measure_request(client), self._calls.track():
                if self._opened is None:
                    raise WorkerUnavailable("the gateway is still connecting: try again when /ready answers 200")
                await work(client, self._opened)
        except Exception as error:
            if client.response is None:
                raise
            await client.fail(error)
        assert client.response is not None
        return client.response

    async def _forward(self, request: OutgoingRequest, client: ClientStream, opened: Opened) -> None:
        async with opened.forwarder.open(request) as answer:
            await answer.send(client)

    async def _forward_with_layouts(
        self, request: OutgoingRequest, chat: ChatBody, tenant: str, client: ClientStream, opened: Opened
    ) -> None:
        """Sends the request with media replaced; once more, with new layouts, where the server fails."""
        assert opened.layouts is not None
        avoided: tuple[str, ...] = ()
        while True:
            opened.forwarder.check(request)  # encoders load nothing for a request that no server takes
            begin = time.perf_counter()
            async with opened.layouts.hold(chat.parts, request.request_id, tenant) as measured:
                self._metrics.measured_items((each.layout.kind for each in measured), time.perf_counter() - begin)
                transfer_params = {each.item_id: each.transfer_params() for each in reversed(measured)}
                body = chat.replaced([each.replaced() for each in measured], transfer_params)
                async with opened.forwarder.open(replace(request, body=body), avoided) as answer:
                    if avoided or not await answer.is_server_error():
                        await answer.send(client)
                        return
                    avoided = (answer.server.address,)
            self._metrics.retried("embeddings lost")

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, http: web.Request) -> web.Response:
        ready, details = self._readiness()
        return web.json_response({"ready": ready, **details}, status=200 if ready else 503)


def _request(http: web.Request, body: bytes, key: bytes, access: Access) -> OutgoingRequest:
    """
    Raises:
        BadRequest: a path that leads out of /v1 or is not URL-encoded.
    """
    path = http.rel_url.raw_path_qs
    if {".", ".."} & set(unquote(http.rel_url.raw_path).split("/")) or not path.isascii():
        raise BadRequest(f"the path {path!r} leads out of /v1, or is not URL-encoded")
    headers = passed_on(http.headers)
    headers.popall("Content-Length", None)
    if access.needs_key:  # it was for this port alone
        headers.popall("Authorization", None)
    headers.popall(_TENANT_HEADER, None)  # clients do not choose it
    if tenant := current_tenant():
        headers[_TENANT_HEADER] = tenant
    for name, value in outgoing_metadata():
        headers[name] = value
    request_id = headers.get("X-Request-Id", "")[:_MAX_ID_LENGTH] or uuid.uuid4().hex
    set_request_id(request_id)
    return OutgoingRequest(http.method, path, headers, body, key, request_id)
