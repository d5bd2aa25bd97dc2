"""`/metrics` at the door: the series of all replicas, with the labels by which service discovery names these."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from vitrine_vlm.deploy.ray_serve.metrics_targets import MetricsTarget, all_targets

_TIMEOUT_S = 5.0

_log = logging.getLogger("ray.serve")


class AllMetrics:
    """Answers with the metrics of the deployments' replicas, those left out that do not answer in time.

    `?job=` asks for those of one job alone. Where none of these answers it gets 503, so that Prometheus's `up` is 0.
    """

    def __init__(self, deployments: Sequence[DeploymentHandle[Any]]) -> None:
        self._deployments = deployments

    async def forward(self, request: Request, send: Send) -> None:
        job = request.query_params.get("job")
        targets = [each for each in await all_targets(self._deployments) if job in (None, each["labels"]["job"])]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_TIMEOUT_S), raise_for_status=True) as session:
            pages = await asyncio.gather(*(_page(session, target) for target in targets))
        if job is not None and not any(pages):
            refused = Response(f"no replica of job {job} answers\n", 503, media_type="text/plain")
            return await refused(request.scope, request.receive, send)
        labelled = [(page, target["labels"]) for page, target in zip(pages, targets, strict=True)]
        body = await asyncio.to_thread(merged, labelled)  # many replicas have more than the event loop should wait for
        await Response(body, media_type=CONTENT_TYPE_LATEST)(request.scope, request.receive, send)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(pages: Iterable[tuple[str, Mapping[str, str]]]) -> bytes:
    """Merges pages in Prometheus's text format into one, in which each family stands once.

    Args:
        pages: their texts, and the labels that the series of each get.
    """
    families: dict[str, Metric] = {}
    for text, labels in pages:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples.extend(sample._replace(labels={**sample.labels, **labels}) for sample in family.samples)
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


async def _page(session: aiohttp.ClientSession, target: MetricsTarget) -> str:
    address = target["targets"][0]
    try:
        async with session.get(f"http://{address}/metrics") as response:
            return await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        _log.warning("no metrics of %s: %r", address, error)
        return ""
