"""The answer to one HTTP client, begun once there is something to send."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from aiohttp import web

from vitrine_vlm.errors import as_vitrine_error
from vitrine_vlm.service_runtime.http_errors import error_body, is_client_gone

EVENT_STREAM = "text/event-stream"


class ClientStream:
    """One answer, whose bytes are sent as they come.

    response: None until the head is sent; from then on no other server can answer, and no status can be sent.
    first_bytes_s: from the request's arrival to the first bytes of the answer's body, in seconds; None until then.
    """

    def __init__(self, http: web.Request) -> None:
        self.response: web.StreamResponse | None = None
        self.first_bytes_s: float | None = None
        self._http = http
        self._begin = time.perf_counter()

    async def start(self, status: int, reason: str | None, headers: Mapping[str, str]) -> None:
        self.response = web.StreamResponse(status=status, reason=reason, headers=headers)
        await self.response.prepare(self._http)

    async def write(self, data: bytes) -> None:
        """
        Raises:
            ConnectionError: the client has disconnected.
        """
        assert self.response is not None
        if self.first_bytes_s is None:
            self.first_bytes_s = time.perf_counter() - self._begin
        await self.response.write(data)

    async def fail(self, error: Exception) -> None:
        """Ends an answer that has begun: with an event, or else so that the client notices that it is cut off."""
        assert self.response is not None
        if is_client_gone(self._http, error):
            return
        if self.response.content_type == EVENT_STREAM:
            body = json.dumps(error_body(as_vitrine_error(error)), ensure_ascii=False)
            await self.response.write(f"data: {body}\n\n".encode())
        elif self._http.transport is not None:
            as_vitrine_error(error)  # which logs it
            self._http.transport.close()
