"""Server-sent events of the HTTP port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from vitrine_vlm.errors import VitrineError, as_vitrine_error
from vitrine_vlm.llm_worker.frontend.http_headers import id_headers
from vitrine_vlm.service_runtime.http_errors import is_client_gone

_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect events otherwise
}


class SseStream:
    """Sends objects as events. The response begins with the first of them."""

    def __init__(self, http: web.Request) -> None:
        self.response = web.StreamResponse(headers=_HEADERS | id_headers())
        self._http = http

    @property
    def has_begun(self) -> bool:
        return self.response.prepared

    async def send(self, body: dict[str, Any]) -> None:
        """Sends an event; one with a `type` is named by it, as the Responses API does."""
        if not self.has_begun:
            await self.response.prepare(self._http)
        head = f"event: {body['type']}\n".encode() if "type" in body else b""
        await self.response.write(head + b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")

    async def send_done(self) -> None:
        """Sends OpenAI's mark of a complete stream."""
        await self.response.write(b"data: [DONE]\n\n")

    @asynccontextmanager
    async def errors_as_events(self, event_of: Callable[[VitrineError], dict[str, Any]]) -> AsyncIterator[None]:
        """Sends an error of the body as the last event once the response has begun; before, it has a status."""
        try:
            yield
        except Exception as error:
            if not self.has_begun:
                raise
            if not is_client_gone(self._http, error):
                await self.send(event_of(as_vitrine_error(error)))
