"""The models of the HTTP port: the one that is served, once it is loaded."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from vitrine_vlm.errors import UnknownModel, WorkerUnavailable
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.service_runtime.access_log import report


class ServedModels:
    """Holds the served model for the handlers, and lists it."""

    def __init__(self) -> None:
        self._served: ServedModel | None = None
        self._created = int(time.time())

    def open(self, served: ServedModel) -> None:
        self._served = served

    def get(self) -> ServedModel:
        """
        Raises:
            WorkerUnavailable: it is still loading.
        """
        if self._served is None:
            raise WorkerUnavailable("the worker is still loading its model: try again when /ready answers 200")
        report(model=self._served.name)
        return self._served

    def named(self, name: str) -> ServedModel:
        """
        Raises:
            UnknownModel: it has another name.
            WorkerUnavailable: it is still loading.
        """
        served = self.get()
        if name != served.name:
            raise UnknownModel(f"the model {name[:200]!r} is not served here: send {served.name!r}, as in /v1/models")
        return served

    def add_to(self, application: web.Application) -> None:
        application.router.add_get("/v1/models", self._list)
        application.router.add_get("/v1/models/{name:.+}", self._show)  # hub ids have slashes

    async def _list(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card(self.get())]})

    async def _show(self, http: web.Request) -> web.Response:
        return web.json_response(self._card(self.named(http.match_info["name"])))

    def _card(self, served: ServedModel) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "vitrine",
            "root": served.root,
            "parent": None,
            "max_model_len": served.generator.max_model_len,
        }
