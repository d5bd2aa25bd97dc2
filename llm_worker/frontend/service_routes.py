"""Routes of the HTTP port that are about the worker: probes, version, metrics, its prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from vitrine_vlm import __version__
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.service_runtime.metrics_port import add_metrics


class ServiceRoutes:
    """
    Args:
        readiness: whether requests can be served, and why not.
        allow_cache_reset: whether clients may empty the prefix cache; else there are no such routes.
        serves_metrics: likewise.
    """

    def __init__(
        self,
        metrics: LlmMetrics,
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        models: ServedModels,
        allow_cache_reset: bool,
        serves_metrics: bool,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._models = models
        self._allow_cache_reset = allow_cache_reset
        self._serves_metrics = serves_metrics

    def add_to(self, application: web.Application) -> None:
        router = application.router
        router.add_get("/health", self._health)
        router.add_get("/ready", self._ready)
        router.add_get("/ping", self._ready)
        router.add_post("/ping", self._ready)
        router.add_get("/version", self._version)
        if self._serves_metrics:
            add_metrics(application, self._metrics.registry)
        if self._allow_cache_reset:
            for path in ("/reset_prefix_cache", "/flush_cache"):  # vLLM's and SGLang's name of it
                router.add_post(path, self._reset_prefix_cache)

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, http: web.Request) -> web.Response:
        ready, details = self._readiness()
        return web.json_response({"ready": ready, **details}, status=200 if ready else 503)

    async def _version(self, http: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def _reset_prefix_cache(self, http: web.Request) -> web.Response:
        self._models.get().generator.reset_prefix_cache()
        return web.json_response({"status": "ok"})
