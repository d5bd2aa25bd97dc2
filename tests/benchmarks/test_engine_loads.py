"""Loads on servers in turns, against a real worker and encoder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.checkpoints import save_small_qwen3_vl
from benchmarks.compare.workloads import Workload
from benchmarks.engine_loads import Server, measure_all, table, wait_ready
from benchmarks.process_tree import cpu_seconds
from vitrine_vlm.deploy.launcher.stack import Stack

DUMMY = ["--load-format", "dummy"]
WORKLOADS = [Workload("pictures", 4, 2, 4, (96, 64), num_pictures=2), Workload("text", 3, 1, 3, num_pictures=0)]


async def test_every_load_is_measured_on_every_server(tmp_path: Path) -> None:
    folder = save_small_qwen3_vl(tmp_path)
    async with Stack.running(folder, encoder_flags=DUMMY, worker_flags=DUMMY) as stack:
        await stack.wait_ready()
        servers = [Server("first", stack.base_url, os.getpid()), Server("second", stack.base_url, None)]
        records = await measure_all(servers, WORKLOADS, ready_timeout_s=60)
    assert [(each["load"], each["server"]) for each in records] == [
        (workload.name, server.name) for workload in WORKLOADS for server in servers
    ]
    for record in records:
        assert record["num_failures"] == 0, record["failures"]
        assert record["requests_per_s"] > 0 and record["ttft_ms"][50] <= record["ttft_ms"][99]
        assert record["largest_gap_ms"] >= record["itl_ms"][50] > 0 and record["token_ms"] > 0
        assert ("cpu_s_per_request" in record) == (record["server"] == "first")
    assert len(table(records).splitlines()) == 2 + len(records)
    json.dumps(records)


async def test_a_worker_is_waited_for_until_an_encoder_is_connected() -> None:
    """A server without /ready, such as vLLM, is ready when it lists its models."""
    answers = [503, 503, 200]
    asked: list[int] = []

    async def ready(http: web.Request) -> web.Response:
        asked.append(answers[len(asked)])
        return web.Response(status=asked[-1])

    async def models(http: web.Request) -> web.Response:
        return web.json_response({"data": []})

    worker, vllm = web.Application(), web.Application()
    worker.router.add_get("/ready", ready)
    for application in (worker, vllm):
        application.router.add_get("/v1/models", models)
    for application in (worker, vllm):
        async with TestServer(application) as server:
            await wait_ready(Server("some", str(server.make_url("")).rstrip("/"), None), timeout_s=30)
    assert asked == answers
    with pytest.raises(TimeoutError, match=r"some at .* is not ready after 0.1 s"):
        await wait_ready(Server("some", "http://127.0.0.1:9", None), timeout_s=0.1)


def test_cpu_time_grows() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) < before + 0.1:
        sum(range(100_000))
