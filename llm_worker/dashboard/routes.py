"""`/dashboard`: static files, and the data that they show, as JSON. The page requests it every second."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.llm_worker.engine.engine import EngineStats
from vitrine_vlm.llm_worker.generation.generation import Generator, RecentRequest
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.service_runtime.port_limits import MAX_BODY_BYTES

_FOLDER = Path(__file__).parent
# By path below /dashboard: the page, its style and the modules of its script.
_FILES = {"": "index.html"} | {
    f"/{file.name}": file.name for file in _FOLDER.iterdir() if file.suffix in (".css", ".js")
}
# Nothing from other origins, as the page shows what clients have sent. blob: is for previews of what is to be sent,
# data: for the empty icon.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Dashboard:
    """Serves the page. `open` is called once the model is loaded; until then the page shows readiness only.

    Args:
        max_body_nbytes: bytes of the largest request, which the page shows.
        can_ask: whether the API is on the same port, so that the page can have its form.
    """

    def __init__(
        self,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        max_body_nbytes: int = MAX_BODY_BYTES,
        can_ask: bool = True,
    ) -> None:
        self._readiness = readiness
        self._max_body_nbytes = max_body_nbytes
        self._can_ask = can_ask
        self._shown: Callable[[], Awaitable[dict[str, Any]]] | None = None

    def open(
        self,
        model: str,
        generator: Generator,
        engine_stats: Callable[[], EngineStats],
        fleet_client: EncoderClient | PrefillClient,
    ) -> None:
        async def shown() -> dict[str, Any]:
            if isinstance(fleet_client, EncoderClient):
                fleet, answers = "encoders", await fleet_client.encoder_stats()
            else:
                fleet, answers = "prefill workers", {}
            return {
                "model": model,
                "fleet": fleet,
                "engine": asdict(engine_stats()),
                "client": asdict(fleet_client.stats()),
                "encoders": [
                    asdict(status) | {"stats": _as_dict(answers.get(status.address))}
                    for status in fleet_client.status()
                ],
                "recent": [_recent(each) for each in generator.recent],
            }

        self._shown = shown

    def add_routes(self, application: web.Application) -> None:
        for path, name in _FILES.items():
            application.router.add_get(f"/dashboard{path}", self._file_handler(name))
        application.router.add_get("/dashboard/data", self._data)

    async def _data(self, request: web.Request) -> web.Response:
        ready, details = self._readiness()
        shown = await self._shown() if self._shown is not None else {}
        state = {"ready": ready, "reason": details.get("reason"), "max_body_bytes": self._max_body_nbytes}
        state["can_ask"] = self._can_ask
        return web.json_response(state | shown, headers=_HEADERS)

    @staticmethod
    def _file_handler(name: str) -> Callable[[web.Request], Awaitable[web.FileResponse]]:
        async def handler(request: web.Request) -> web.FileResponse:
            return web.FileResponse(_FOLDER / name, headers=_HEADERS)

        return handler


def _as_dict(answer: Message | None) -> dict[str, Any] | None:
    """Every field of a message; 64-bit integers as numbers, which protobuf's JSON has as strings."""
    if answer is None:
        return None
    fields = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {
        name: {key: int(each) for key, each in value.items()} if isinstance(value, dict) else float(value)
        for name, value in fields.items()
    }


def _recent(recent: RecentRequest) -> dict[str, Any]:
    finished = asdict(recent.finished)
    return {
        "request_id": recent.request_id,
        "finished_at": recent.finished_at,
        "elapsed_ms": recent.elapsed_ms,
        "num_items": recent.num_items,
        # From the request's arrival, as stages are; `timings.ttft_ms` begins when its prompt is known.
        "first_token_ms": recent.elapsed_ms - recent.finished.timings.decode_ms,
        **{name: finished[name] for name in ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")},
        "stages": [asdict(stage) for stage in recent.stages],
    }
