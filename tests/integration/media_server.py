"""A loopback web server with the media that tests ask for by URL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class MediaServer:
    """`files` are served by path; "/hangs..." paths answer nothing until `released` is set."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    num_waiting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.Response:
        if request.path.startswith("/hangs"):
            self.num_waiting.release()
            await self.released.wait()
        data = self.files.get(request.path)
        return web.Response(body=data) if data is not None else web.Response(status=404)


@contextlib.asynccontextmanager
async def serve_media() -> AsyncIterator[MediaServer]:
    server = MediaServer()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        server.released.set()
        await runner.cleanup()
