"""A server that takes chat requests as vLLM does which has no tower: media by their sizes alone, rows by a connector.

What it refuses is what vLLM 0.32 refuses (vllm/renderers/chat_utils.py); tests/vllm has the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from vitrine_vlm.service_runtime.tls import ServerTls

TOKENS = ("One", " two", " three")
# What vLLM answers where the connector has not got the rows.
FAILED = {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}
Behaviour = Callable[[web.Request], "web.StreamResponse"]


@dataclass
class Seen:
    """One request, and what is in it."""

    path: str
    headers: dict[str, str]
    raw: bytes
    body: Any

    @property
    def parts(self) -> list[dict[str, Any]]:
        contents = [message.get("content") for message in self.body["messages"]]
        return [part for content in contents if isinstance(content, list) for part in content]

    @property
    def media(self) -> list[dict[str, Any]]:
        return [part for part in self.parts if part["type"] in ("image_embeds", "video_embeds")]


@dataclass
class Upstream:
    """One server.

    video_fields: what the parser of the model's family needs of a video.
    health: status of /health. statuses: of the next answers, 200 where there are no more.
    fails_in_stream: the number of streams that end with an error behind the role.
    gate: answers wait for it, streams behind their first token.
    tls: its certificate, where it is reached by https.
    """

    port: int = 0
    video_fields: tuple[str, ...] = ("video_grid_thw", "timestamps")
    health: int = 200
    statuses: list[int] = field(default_factory=list)
    fails_in_stream: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[Seen] = field(default_factory=list)
    num_cancelled: int = 0
    runner: web.AppRunner | None = None
    tls: ServerTls | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens, on the same port as before."""
        app = web.Application(client_max_size=2**30)
        for path in ("/health", "/ready"):
            app.router.add_get(path, self._health)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_route("*", "/{path:.*}", self._echo)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        context = self.tls.context() if self.tls else None
        await web.TCPSite(self.runner, "127.0.0.1", self.port, ssl_context=context).start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        assert self.runner is not None
        await self.runner.cleanup()

    def reset(self) -> None:
        self.health, self.statuses, self.fails_in_stream, self.num_cancelled = 200, [], 0, 0
        self.seen.clear()
        self.gate.set()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _see(self, request: web.Request) -> Seen:
        raw = await request.read()
        body = json.loads(raw) if raw and request.content_type == "application/json" else None
        self.seen.append(Seen(request.raw_path, dict(request.headers), raw, body))
        return self.seen[-1]

    async def _echo(self, request: web.Request) -> web.Response:
        seen = await self._see(request)
        headers = {"X-Server": self.address, "Keep-Alive": "timeout=5", "Set-Cookie": "a=b"}
        return web.json_response({"path": seen.path, "size": len(seen.raw)}, headers=headers)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        seen = await self._see(request)
        if (status := self.statuses.pop(0) if self.statuses else 200) != 200:
            return web.json_response(FAILED, status=status)
        if problem := refusal(seen, self.video_fields):
            body = {"error": {"message": problem, "type": "BadRequestError", "param": None, "code": 400}}
            return web.json_response(body, status=400)
        with self._counted():
            if seen.body.get("stream"):
                return await self._stream(request, seen.body.get("n", 1))
            await self.gate.wait()
            choices = [
                {"index": index, "message": {"content": "".join(TOKENS)}} for index in range(seen.body.get("n", 1))
            ]
            return web.json_response({"choices": choices, "server": self.address})

    async def _stream(self, request: web.Request, n: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)

        async def send(body: Any) -> None:
            await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")

        for index in range(n):
            delta = {"role": "assistant", "content": ""}
            await send({"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]})
        if self.fails_in_stream:
            self.fails_in_stream -= 1
            await send(FAILED)
        else:
            for number, token in enumerate(TOKENS):
                for index in range(n):
                    await send({"choices": [{"index": index, "delta": {"content": token}, "finish_reason": None}]})
                if number == 0:
                    await self.gate.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


def refusal(seen: Seen, video_fields: tuple[str, ...]) -> str | None:
    """Says why vLLM without a tower refuses the request; None if it takes it."""
    if not isinstance(seen.body, dict) or not isinstance(seen.body.get("messages"), list):
        return "messages: a list is needed"
    params = seen.body.get("ec_transfer_params") or {}
    keys: dict[str, set[str]] = {}
    for part in seen.parts:
        if not isinstance(part, dict) or part["type"] == "text":
            continue
        kind = part["type"].removesuffix("_embeds")
        if part["type"] == kind or kind not in ("image", "video"):
            return f"At most 0 {kind}(s) may be provided in one prompt"
        metadata = part[part["type"]]
        needed = ("image_grid_thw",) if kind == "image" else video_fields
        if missing := set(needed) - set(metadata):
            return f"The data should contain the fields: {missing}"
        for name, values in metadata.items():
            if name not in needed:
                return f"JSON arrays are only supported for metadata: {name}"
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                return f"Metadata {name} must be a finite numeric array"
        if keys.setdefault(kind, set(metadata)) != set(metadata):
            return "All dictionaries in the list of embeddings must have the same keys."
        grid = metadata[f"{kind}_grid_thw"]
        if len(grid) != 3 or len(metadata.get("timestamps", range(grid[0]))) != grid[0]:
            return f"a grid of {grid}"
        entry = params.get(part["uuid"])
        if entry is None or set(entry) != {"ticket", "encoder_id", "kind", "num_tokens", "tenant"}:
            return f"no rows for {part['uuid']}"
    return None


@contextlib.asynccontextmanager
async def serve_upstreams(number: int, tls: ServerTls | None = None) -> AsyncIterator[list[Upstream]]:
    upstreams = [Upstream(tls=tls) for _ in range(number)]
    try:
        for upstream in upstreams:
            await upstream.start()
            upstream.gate.set()
        yield upstreams
    finally:
        for upstream in upstreams:
            upstream.gate.set()
            await upstream.stop()
