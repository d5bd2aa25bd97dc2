"""Server-sent events of the HTTP port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from vitrine_vlm.errors import as_vitrine_error
from vitrine_vlm.llm_worker.frontend.http_headers import id_headers
from vitrine_vlm.service_runtime.http_errors import error_body, is_client_gone

_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect events otherwise
}


class EventStream:
    """Sends objects as events. The response begins with the first of them."""

    def __init__(self, http: web.Request) -> None:
        self.response = web.StreamResponse(headers=_HEADERS | id_headers())
        self._http = http

    @property
    def has_begun(self) -> bool:
        return self.response.prepared

    async def send(self, body: dict[str, Any], name: str = "") -> None:
        """
        Args:
            name: the event's own name, where its receiver wants one.
        """
        if not self.has_begun:
            await self.response.prepare(self._http)
        head = f"event: {name}\n".encode() if name else b""
        await self.response.write(head + b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")

    async def send_done(self) -> None:
        """Sends OpenAI's mark of a complete stream."""
        await self.response.write(b"data: [DONE]\n\n")

    @asynccontextmanager
    async def errors_as_events(self) -> AsyncIterator[None]:
        """Sends an error of the body as the last event once the response has begun; before, it has a status."""
        try:
            yield
        except Exception as error:
            if not self.has_begun:
                raise
            if not is_client_gone(self._http, error):
                await self.send(error_body(as_vitrine_error(error)))
