"""Pages of several replicas as one page of Prometheus's text format."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from starlette.requests import Request

from vitrine_vlm.deploy.ray_serve.all_metrics import AllMetrics, merged
from vitrine_vlm.deploy.ray_serve.metrics_targets import ENCODER_JOB, LLM_JOB


def page(requests: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["outcome"], registry=registry).labels("ok").inc(requests)
    Gauge("load", "Load.", registry=registry).set(requests / 10)
    Histogram("seconds", "Seconds.", buckets=[1.0], registry=registry).observe(requests)
    return generate_latest(registry).decode()


def test_each_family_stands_once_with_the_series_of_all_replicas() -> None:
    text = merged([(page(1), {"pod": "a"}), (page(2), {"pod": "b"}), ("", {"pod": "silent"})]).decode()
    assert text.count("# TYPE requests_total counter") == text.count("# TYPE load gauge") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["seconds"].type == "histogram"
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["requests_total", "a", "ok"] == 1 and values["requests_total", "b", "ok"] == 2
    assert values["load", "a"] == 0.1 and values["load", "b"] == 0.2
    assert values["seconds_bucket", "1.0", "a"] == 1 and values["seconds_bucket", "1.0", "b"] == 0


class Deployment:
    """In place of a deployment handle: replicas of a job at these addresses."""

    def __init__(self, job: str, addresses: Sequence[str]) -> None:
        self._targets = [{"targets": [each], "labels": {"job": job, "pod": each}} for each in addresses]

    def broadcast(self, method: str) -> SimpleNamespace:
        async def results_async(**options: Any) -> list[Any]:
            return self._targets

        return SimpleNamespace(results_async=results_async)


@contextlib.asynccontextmanager
async def metrics_port(requests: int) -> AsyncIterator[str]:
    """Its address."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=page(requests))

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def ask(metrics: AllMetrics, query: str) -> tuple[int, str]:
    """Status and body of the answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": query.encode(), "headers": []}
    await metrics.forward(Request(scope), send)
    return sent[0]["status"], sent[1]["body"].decode()


async def test_one_job_alone_is_asked_for_and_one_that_does_not_answer_is_no_empty_page() -> None:
    async with metrics_port(1) as encoder, metrics_port(2) as worker:
        metrics = AllMetrics([Deployment(ENCODER_JOB, [encoder]), Deployment(LLM_JOB, [worker])])  # type: ignore[list-item]
        status, text = await ask(metrics, "")
        assert status == 200 and f'job="{ENCODER_JOB}"' in text and f'job="{LLM_JOB}"' in text
        status, text = await ask(metrics, f"job={LLM_JOB}")
        assert status == 200 and f'job="{ENCODER_JOB}"' not in text and f'pod="{worker}"' in text
    for addresses in ([], ["127.0.0.1:9"]):
        none = AllMetrics([Deployment(LLM_JOB, addresses)])  # type: ignore[list-item]
        assert await ask(none, f"job={LLM_JOB}") == (503, f"no replica of job {LLM_JOB} answers\n")
        assert (await ask(none, ""))[0] == 200
