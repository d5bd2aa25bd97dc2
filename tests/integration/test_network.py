"""An encoder at the other end of a line that is slow, loses packets, or is cut without a word."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.integration.fleet import ServiceProcess
from tests.integration.media import picture
from tests.integration.network import Link, Namespace

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAR, NEAR = "10.213.7.1", "10.213.7.2"
# Both sides ping each other every 10 s and wait 10 s for the answer.
NOTICED_S = 25.0


@dataclass
class Split:
    """A worker with an encoder beside it, and one at the other end of the link. `client` calls the worker."""

    link: Link
    far: ServiceProcess
    far_metrics: str
    worker: ServiceProcess
    client: aiohttp.ClientSession
    model: str

    async def ask(self, seed: int) -> str:
        """Asks about one picture; returns the answer's text."""
        data = base64.b64encode(picture(seed, 96, 64).data).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": "What?"},
        ]
        body = {
            "model": self.model,
            "max_tokens": 6,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        async with self.client.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return str(answer["choices"][0]["message"]["content"])

    async def num_ready(self) -> int:
        async with self.client.get("/ready") as response:
            encoders: list[dict[str, Any]] = (await response.json()).get("encoders", [])
            return sum(each["ready"] for each in encoders)

    async def wait_ready(self, count: int) -> None:
        async with asyncio.timeout(60):
            while await self.num_ready() != count:
                await asyncio.sleep(0.1)

    async def far_gauge(self, name: str) -> float:
        async with self.client.get(self.far_metrics) as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def split(qwen3_vl_folder: Path) -> AsyncIterator[Split]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            host = Namespace(FAR)
            stack.callback(host.close)
            own = Namespace(NEAR)
            stack.callback(own.close)
        except OSError as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        link = await stack.enter_async_context(Link.between(host, own))

        def start(place: Namespace, module: str, *flags: str) -> ServiceProcess:
            process = ServiceProcess(
                f"vitrine_vlm.{module}", "--model", str(qwen3_vl_folder), *flags, prefix=place.prefix
            )
            stack.callback(process.stop)
            return process

        # No embedding cache: every picture is computed where it is sent.
        flags = ["--host", FAR, "--port", "50051", "--metrics-port", "9100"]
        far = start(host, "encoder_service", *flags)
        near = start(own, "encoder_service", "--port", "50051")
        for process in (far, near):
            await asyncio.to_thread(process.wait_listening)
        encoders = f"{FAR}:50051,127.0.0.1:50051"
        flags = ["--encoders", encoders, "--transport", "grpc", "--port", "8000", "--grpc-port", "50052"]
        worker = start(own, "llm_worker", *flags)
        await asyncio.to_thread(worker.wait_serving)

        def make_socket(address: Any) -> socket.socket:
            with own.entered():
                return socket.socket(address[0], address[1], address[2])

        connector = aiohttp.TCPConnector(socket_factory=make_socket)
        base_url = "http://127.0.0.1:8000"
        client = await stack.enter_async_context(aiohttp.ClientSession(base_url, connector=connector))
        metrics = f"http://{FAR}:9100/metrics"
        yield Split(link, far, metrics, worker, client, qwen3_vl_folder.name)


async def test_over_a_slow_line_that_loses_packets_answers_are_the_same(split: Split) -> None:
    await split.wait_ready(2)
    expected = [await split.ask(seed) for seed in range(8)]
    carried = split.link.num_carried
    split.link.delay_s, split.link.loss = 0.03, 0.03
    try:
        # Other pictures of the same kind in between, so that no cache answers for the line.
        found = await asyncio.gather(*(split.ask(seed) for seed in range(100, 116)))
        again = [await split.ask(seed) for seed in range(100, 116)]
    finally:
        split.link.delay_s = split.link.loss = 0.0
    assert found == again
    assert split.link.num_lost > 0 and split.link.num_carried > carried
    assert [await split.ask(seed) for seed in range(8)] == expected


async def test_a_line_that_is_cut_costs_no_request(split: Split) -> None:
    await split.wait_ready(2)
    split.link.is_cut = True
    try:
        async with asyncio.timeout(2 * NOTICED_S):
            await asyncio.gather(*(split.ask(seed) for seed in range(200, 212)))
        async with asyncio.timeout(NOTICED_S):
            while await split.num_ready() != 1:
                await asyncio.sleep(0.1)
        assert await asyncio.gather(*(split.ask(seed) for seed in range(212, 220)))
    finally:
        split.link.is_cut = False
    await split.wait_ready(2)
    before = await split.far_gauge("vitrine_encoder_items_total")
    await asyncio.gather(*(split.ask(seed) for seed in range(220, 236)))
    assert await split.far_gauge("vitrine_encoder_items_total") > before
    async with asyncio.timeout(NOTICED_S):  # the session of the line that was cut has ended, too
        while await split.far_gauge("vitrine_encoder_sessions") != 1:
            await asyncio.sleep(0.1)
