"""One worker process as its operator and its clients meet it: probes, metrics, cancelling, overload, shutting down."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.fleet import Fleet, ServiceProcess, start_fleet
from tests.integration.media import picture
from tests.integration.media_server import MediaServer, serve_media
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.sample_models.reference import Reference

IMAGE_ID = 262


@pytest.fixture
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


def base_url(process: ServiceProcess) -> str:
    return f"http://{process.addresses['http']}"


async def metric(process: ServiceProcess, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{base_url(process)}/metrics") as response:
        found = re.search(rf"^{re.escape(name)} (\S+)$", await response.text(), re.MULTILINE)
    assert found, f"no metric {name}"
    return float(found[1])


async def until_metric(process: ServiceProcess, name: str, value: float, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while await metric(process, name) != value:
            await asyncio.sleep(0.02)


async def post(process: ServiceProcess, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], str | None]:
    async with aiohttp.ClientSession() as session, session.post(base_url(process) + path, json=body) as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


def long_chat(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": fleet.folder.name, "messages": messages, "max_tokens": 3000, "stream": True, **fields}


async def test_probes(small_fleet: Fleet) -> None:
    worker = small_fleet.worker_processes["shm"]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{base_url(worker)}/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        async with session.get(f"{base_url(worker)}/ready") as response:
            body = await response.json()
            assert (response.status, body["ready"]) == (200, True)
            assert body["encoders"][0]["transport"] == "shm"
    for address, service in (
        (worker.addresses["grpc"], "vitrine.llm.v1.Llm"),
        (small_fleet.encoder.addresses["grpc"], "vitrine.encoder.v1.Encoder"),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            for name in ("", service):
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            names = [each.name async for answer in call for each in answer.list_services_response.service]
            assert {service, "grpc.health.v1.Health"} <= set(names)


async def test_a_client_that_goes_away_frees_everything(small_fleet: Fleet) -> None:
    worker = small_fleet.worker_processes["shm"]
    url = f"{base_url(worker)}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=long_chat(small_fleet)) as response:
        await response.content.readuntil(b"\n\n")
        assert await metric(worker, "vitrine_llm_running") == 1
    async with grpc.aio.insecure_channel(worker.addresses["grpc"]) as channel:
        sampling = llm_pb2.SamplingParams(max_tokens=3000, ignore_eos=True)
        request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling)
        call = llm_pb2_grpc.LlmStub(channel).Generate(request)
        for event in ("started", "delta"):
            answer = await call.read()
            assert isinstance(answer, llm_pb2.GenerateResponse) and answer.WhichOneof("event") == event
        call.cancel()
    await until_metric(worker, "vitrine_llm_running", 0)
    await until_metric(worker, "vitrine_llm_kv_blocks_used", 0)


@pytest.mark.parametrize(("prefix", "ahead"), [(80, 79), (40, 0)], ids=["long enough", "not worth a step"])
async def test_text_before_an_image_is_prefilled_while_the_image_is_on_its_way(
    small_fleet: Fleet, media_server: MediaServer, prefix: int, ahead: int
) -> None:
    worker = small_fleet.worker_processes["shm"]
    computed = 'vitrine_llm_computed_tokens_total{phase="prefill"}'
    before = await metric(worker, computed)
    body = {
        "model": small_fleet.folder.name,
        "prompt": [1] * prefix + [IMAGE_ID, 2, 3],
        "media": [{"type": "image_url", "image_url": {"url": media_server.url("/hangs.png")}}],
        "max_tokens": 1,
    }
    asking = asyncio.create_task(post(worker, "/v1/completions", body))
    await until_metric(worker, computed, before + ahead)
    await asyncio.sleep(0.1)
    assert not asking.done() and await metric(worker, computed) == before + ahead
    media_server.files["/hangs.png"] = picture(1, 64, 64).data
    media_server.released.set()
    status, answer, _ = await asking
    assert (status, answer["usage"]["prompt_tokens"]) == (200, prefix + 4 + 2)


async def test_invalid_sampling_over_grpc(small_fleet: Fleet) -> None:
    async with grpc.aio.insecure_channel(small_fleet.worker_processes["shm"].addresses["grpc"]) as channel:
        stub = llm_pb2_grpc.LlmStub(channel)
        for prompt, sampling in (
            (llm_pb2.Prompt(text="Hello"), llm_pb2.SamplingParams(temperature=-1)),
            (llm_pb2.Prompt(text="Hello"), llm_pb2.SamplingParams(logprobs=21)),
            (llm_pb2.Prompt(), llm_pb2.SamplingParams()),
            (llm_pb2.Prompt(token_ids=llm_pb2.TokenIds(ids=[999_999])), llm_pb2.SamplingParams()),
            (llm_pb2.Prompt(text="Hello", media=[llm_pb2.MediaItem()]), llm_pb2.SamplingParams()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Prefill(llm_pb2.PrefillRequest(prompt=prompt, sampling=sampling))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_token_ids_in_and_out_without_a_tokenizer_then_overload_then_an_orderly_end(
    small_fleet: Fleet, tmp_path: Any
) -> None:
    flags = ["--skip-tokenizer-init", "--max-num-seqs", "1", "--max-waiting", "0"]
    with start_fleet(small_fleet.folder, transports=["grpc"], worker_flags=flags) as fleet:
        worker = fleet.worker_processes["grpc"]
        reference = Reference(fleet.folder)
        media = [picture(3, 96, 64)]
        inputs = reference.inputs("<|vision_start|><|image_pad|><|vision_end|>What?", media)
        expected = reference.greedy(inputs, 16)[0]
        async with fleet.connected() as connected:
            generated = await connected.worker("grpc").generate(inputs["input_ids"][0].tolist(), media, 16)
        assert (generated.token_ids, generated.text) == (expected, "")

        body = {"model": fleet.folder.name, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        status, answer, _ = await post(worker, "/v1/completions", body)
        assert (status, len(answer["choices"][0]["token_ids"]), answer["choices"][0]["text"]) == (200, 4, "")
        for path, refused in (
            ("/v1/completions", {**body, "prompt": "text"}),
            ("/v1/chat/completions", long_chat(fleet)),
        ):
            status, answer, _ = await post(worker, path, refused)
            assert (status, answer["error"]["code"]) == (400, "invalid_request")
            assert "tokenizer" in answer["error"]["message"]

        async with aiohttp.ClientSession() as session:
            running = {**body, "max_tokens": 600, "stream": True, "ignore_eos": True}
            async with session.post(f"{base_url(worker)}/v1/completions", json=running) as response:
                await response.content.readuntil(b"\n\n")
                status, answer, retry_after = await post(worker, "/v1/completions", body)
                assert (status, answer["error"]["code"]) == (429, "overloaded")
                assert retry_after is not None and int(retry_after) > 0

                # What runs is finished after SIGTERM.
                worker.process.send_signal(signal.SIGTERM)
                rest = (await response.content.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in rest.split("\n\n") if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert await asyncio.to_thread(worker.process.wait, 20) == 0
        assert fleet.encoder.stop() == 0
