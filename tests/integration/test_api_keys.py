"""A worker in a process of its own, with keys from its environment and a file, and a port for its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
import grpc
import openai
import pytest
import yaml

from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess, Worker
from tests.service_runtime.test_api_keys import ALICE, BOB, bearer, entry
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.service_runtime.health import health_status

OPERATOR = "the-operators-own-key"


async def test_keys_from_start_to_end(qwen3_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRINE_LLM_API_KEY", OPERATOR)
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": [entry(ALICE, "alice", "a")]}))
    metrics_port = free_port()
    flags = ["--model", str(qwen3_vl_folder), "--encoders", "127.0.0.1:9", "--connect-timeout-s", "0.5", "--port", "0"]
    flags += ["--grpc-port", "0", "--api-keys-file", str(file), "--metrics-port", str(metrics_port)]
    process = ServiceProcess("vitrine_vlm.llm_worker", *flags)
    try:
        addresses = await asyncio.to_thread(process.wait_serving)
        url = f"http://{addresses['http']}"
        await ask_over_http(url, qwen3_vl_folder.name)
        await ask_over_grpc(addresses["grpc"])
        file.write_text("keys: [")
        await until(lambda: any("API keys stay as they were" in line for line in process.lines))
        assert await is_known(url, ALICE) and not await is_known(url, BOB)
        file.write_text(yaml.safe_dump({"keys": [entry(BOB, "bob")]}))
        await until(lambda: any("read 1 API keys" in line for line in process.lines))
        assert await is_known(url, BOB) and await is_known(url, OPERATOR) and not await is_known(url, ALICE)
        async with aiohttp.ClientSession() as session:
            assert (await session.get(f"{url}/metrics", headers=bearer(BOB))).status == 404
            metrics = await (await session.get(f"http://{addresses['metrics']}/metrics")).text()
            data = await (await session.get(f"http://{addresses['metrics']}/dashboard/data")).json()
        assert 'vitrine_llm_key_requests_total{key="alice"}' in metrics
        assert 'vitrine_llm_key_refusals_total{key="",reason="no_key"}' in metrics
        assert (data["model"], data["can_ask"]) == (qwen3_vl_folder.name, False)
    finally:
        assert await asyncio.to_thread(process.stop) == 0
    config = LlmConfig.from_command_line(flags)
    printed = config.as_yaml() + str(config.as_environment()) + repr(config)
    assert str(file) in printed
    for key in (OPERATOR, ALICE, BOB):
        assert key not in "\n".join(process.lines) + printed


async def ask_over_http(url: str, model: str) -> None:
    for key in (OPERATOR, ALICE):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            answer = await client.completions.create(model=model, prompt="Hello", max_tokens=4)
            assert answer.usage is not None and answer.usage.completion_tokens > 0
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=BOB, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with aiohttp.ClientSession(url) as session:
        assert (await session.get("/health")).status == 200
        assert (await session.get("/v1/models")).headers["WWW-Authenticate"] == "Bearer"


async def ask_over_grpc(address: str) -> None:
    assert await health_status(address, 5.0) in ("SERVING", "NOT_SERVING")
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Worker(llm_pb2_grpc.LlmStub(channel)).generate("Hello", [], 4)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text=""))
            await llm_pb2_grpc.LlmStub(channel).Prefill(request, metadata=tuple(bearer(ALICE).items()))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "the key is known, the prompt is empty"


async def is_known(url: str, key: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models", headers=bearer(key)) as response:
        return response.status == 200


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.05)
