"""A client to a worker's HTTP port in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.llm_worker.frontend.openai_http import OpenAiHttp
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_requests import bodies_within
from vitrine_vlm.service_runtime.port_limits import DEFAULT_LIMITS, PortLimits
from vitrine_vlm.service_runtime.running_calls import RunningCalls

Client = TestClient[Any, Any]


@asynccontextmanager
async def client_of(
    served: ServedModel | None,
    origins: frozenset[str] = frozenset(),
    allow_cache_reset: bool = False,
    access: Access | None = None,
    limits: PortLimits = DEFAULT_LIMITS,
) -> AsyncIterator[Client]:
    metrics = LlmMetrics()
    http = OpenAiHttp(
        metrics,
        lambda: (False, {"reason": "loading the model"}),
        RequestTracker(metrics, RunningCalls()),
        origins,
        allow_cache_reset,
        access,
    )
    if served is not None:
        http.open(served)
    # TestServer cancels the handlers of clients that have disconnected, as the worker's own server does.
    application = http.application()
    application.middlewares.append(bodies_within(limits, ByteBudget(1 << 30), RunningCalls()))
    async with TestClient(TestServer(application)) as client:
        yield client


def body(worker: LocalWorker, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": worker.served.name, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


async def events(response: Any) -> list[dict[str, Any]]:
    lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
