"""A worker's HTTP port whose answers a test chooses: real workers do not break off or hang when asked to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from aiohttp import web

from vitrine_vlm.llm_worker.dashboard.routes import Dashboard
from vitrine_vlm.service_runtime.port_limits import MAX_BODY_BYTES

Answer = Literal["whole", "breaks", "ends early", "hangs", "error event", "from a proxy"]


class Peer:
    """Serves the page, and answers each chat request as `answer` says, with the question's text.

    bodies: of the chat requests that have come. client_gone: the client of one that hangs has disconnected.
    is_shown: set by the test once the page shows the answer so far; one that breaks waits for it.
    state: of readiness, and the reason. has_failed: whether the page's data have status 500.
    """

    def __init__(self) -> None:
        self.answer: Answer = "whole"
        self.bodies: list[dict[str, Any]] = []
        self.client_gone = threading.Event()
        self.is_shown = threading.Event()
        self.state = (False, "loading the model")
        self.has_failed = False

    def application(self) -> web.Application:
        @web.middleware
        async def failing(request: web.Request, handler: Any) -> web.StreamResponse:
            if self.has_failed and request.path == "/dashboard/data":
                return web.Response(status=500)
            response: web.StreamResponse = await handler(request)
            return response

        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[failing])
        Dashboard(lambda: (self.state[0], {"reason": self.state[1]})).add_routes(app)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json())
        text = self.bodies[-1]["messages"][0]["content"][-1]["text"]
        if self.answer == "from a proxy":
            return web.Response(status=502, text="<h1>Bad Gateway</h1>", content_type="text/html")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await response.write(b": a comment, as proxies send them\n\n" + _event({"choices": [_choice(text)]}))
        match self.answer:
            case "breaks":
                assert http.transport is not None
                # A browser discards what it has received and not yet handed to the page.
                await asyncio.to_thread(self.is_shown.wait, 30)
                http.transport.close()  # the last chunk is missing
            case "hangs":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.client_gone.set()
            case "error event":
                await response.write(_event({"error": {"message": "the lease expired"}}))
            case "whole":
                await response.write(_event({"choices": [_choice("", "stop")]}))
                usage = {"prompt_tokens": 7, "completion_tokens": 3}
                await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response


@contextmanager
def serving(peer: Peer) -> Iterator[str]:
    """Serves the peer on a thread of its own, as the browser is driven by blocking calls. Yields its base URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(peer.application(), handler_cancellation=True, shutdown_timeout=1)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port: int = runner.addresses[0][1]
        return port

    thread = threading.Thread(target=loop.run_forever, name="peer")
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _choice(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"delta": {"content": content}, "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
