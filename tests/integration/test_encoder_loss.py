"""Encoders that are not there, go away in the middle of a request, or serve something else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.fleet import ServiceProcess
from tests.integration.media import picture
from tests.integration.media_server import MediaServer, serve_media
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint

Start = Callable[..., ServiceProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[ServiceProcess] = []

    def start_process(module: str, *flags: str) -> ServiceProcess:
        processes.append(ServiceProcess(module, *flags))
        return processes[-1]

    yield start_process
    for process in reversed(processes):
        process.stop()


@pytest.fixture
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        server.files["/hangs.png"] = picture(3, 96, 64).data
        yield server


def encoder(start: Start, folder: Path, port: int = 0) -> ServiceProcess:
    return start(
        "vitrine_vlm.encoder_service", "--model", str(folder), "--port", str(port), "--allow-private-addresses"
    )


def worker(start: Start, folder: Path, *addresses: str, flags: Sequence[str] = ()) -> ServiceProcess:
    own = ["--model", str(folder), "--encoders", ",".join(addresses), "--port", "0", "--grpc-port", "0"]
    process = start("vitrine_vlm.llm_worker", *own, *flags)
    process.wait_serving()
    return process


async def get(process: ServiceProcess, path: str) -> tuple[int, str]:
    url = f"http://{process.addresses['http']}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def wait_ready(process: ServiceProcess, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while (await get(process, "/ready"))[0] != 200:
            await asyncio.sleep(0.1)


async def ask(process: ServiceProcess, folder: Path, url: str | None) -> tuple[int, dict[str, Any]]:
    image = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    body = {
        "model": folder.name,
        "max_tokens": 8,
        "temperature": 0,
        "messages": [{"role": "user", "content": [*image, {"type": "text", "text": "What?"}]}],
    }
    url = f"http://{process.addresses['http']}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


async def test_killed_encoder_fails_its_request_and_a_new_one_takes_over(
    start: Start, media_server: MediaServer, qwen3_vl_folder: Path
) -> None:
    first = encoder(start, qwen3_vl_folder)
    address = first.wait_listening()["grpc"]
    llm = worker(start, qwen3_vl_folder, address)
    await wait_ready(llm)

    request = asyncio.create_task(ask(llm, qwen3_vl_folder, media_server.url("/hangs.png")))
    async with asyncio.timeout(20):
        await media_server.num_waiting.acquire()
    first.stop(signal.SIGKILL)
    async with asyncio.timeout(20):
        status, body = await request
    assert (status, body["error"]["code"]) == (503, "encoder_unavailable"), body
    assert address in body["error"]["message"]

    # Text needs no encoder.
    status, body = await ask(llm, qwen3_vl_folder, None)
    assert status == 200, body

    encoder(start, qwen3_vl_folder, int(address.rpartition(":")[2])).wait_listening()
    await wait_ready(llm)
    media_server.released.set()
    status, body = await ask(llm, qwen3_vl_folder, media_server.url("/hangs.png"))
    assert status == 200, body


async def test_killed_encoder_is_replaced_by_its_sibling_within_the_request(
    start: Start, media_server: MediaServer, qwen3_vl_folder: Path
) -> None:
    encoders = [encoder(start, qwen3_vl_folder) for _ in range(2)]
    addresses = [process.wait_listening()["grpc"] for process in encoders]
    llm = worker(start, qwen3_vl_folder, *addresses)
    async with asyncio.timeout(60):
        while (await get(llm, "/ready"))[1].count('"ready": true') < 1 + len(addresses):
            await asyncio.sleep(0.1)

    # Load is bounded, so eight requests at once are on both encoders when one of them dies.
    paths = [f"/hangs-{index}.png" for index in range(8)]
    for index, path in enumerate(paths):
        media_server.files[path] = picture(index, 96, 64).data
    requests = [asyncio.create_task(ask(llm, qwen3_vl_folder, media_server.url(path))) for path in paths]
    async with asyncio.timeout(20):
        for _ in paths:
            await media_server.num_waiting.acquire()
    encoders[0].stop(signal.SIGKILL)
    async with asyncio.timeout(20):
        await media_server.num_waiting.acquire()  # asked for again, by the sibling
    media_server.released.set()
    for status, body in await asyncio.gather(*requests):
        assert status == 200, body


async def test_unreachable_encoder_is_an_error_that_names_it(
    start: Start, tmp_path: Path, qwen3_vl_folder: Path
) -> None:
    pool_of_a_killed_encoder = tmp_path / f"vitrine-{'0' * 32}"
    pool_of_a_killed_encoder.touch()
    llm = worker(start, qwen3_vl_folder, "127.0.0.1:9", flags=["--shm-folder", str(tmp_path)])
    assert not pool_of_a_killed_encoder.exists(), "every service's start removes it"
    status, text = await get(llm, "/ready")
    assert status == 503
    assert "127.0.0.1:9" in text
    status, body = await ask(llm, qwen3_vl_folder, "http://127.0.0.1:9/a.png")
    assert (status, body["error"]["code"]) == (503, "encoder_unavailable"), body
    assert "127.0.0.1:9" in body["error"]["message"]


async def test_encoder_of_another_checkpoint_is_refused(start: Start, tmp_path: Path, qwen3_vl_folder: Path) -> None:
    """Same name, same dims, other weights: only the revision differs."""
    other = save_random_checkpoint(tmp_path / qwen3_vl_folder.name, "qwen3_vl", seed=1)
    address = encoder(start, other).wait_listening()["grpc"]
    llm = worker(start, qwen3_vl_folder, address)
    async with asyncio.timeout(20):
        while "revision" not in (await get(llm, "/ready"))[1]:
            await asyncio.sleep(0.1)
    assert (await get(llm, "/ready"))[0] == 503
