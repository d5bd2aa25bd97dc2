"""A stream sends each event as soon as it is known, and an error after the first token as an event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.llm_worker.frontend.openai_http import OpenAiHttp
from vitrine_vlm.llm_worker.generation.events import Delta, GenerationEvent, GenerationRequest, Observe
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.service_runtime.running_calls import RunningCalls


@dataclass
class HeldGenerator:
    """The real generator; its second token waits for `go_on`, and is replaced by `error` if there is one."""

    generator: Generator
    error: Exception | None = None
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokenizer(self) -> PromptTokenizer | None:
        return self.generator.tokenizer

    async def generate(self, request: GenerationRequest, observe: Observe) -> AsyncGenerator[GenerationEvent]:
        num_tokens = 0
        async with aclosing(self.generator.generate(request, observe)) as events:
            async for event in events:
                num_tokens += isinstance(event, Delta)
                if num_tokens == 2:
                    await self.go_on.wait()
                    if self.error is not None:
                        raise self.error
                yield event


@asynccontextmanager
async def streaming(worker: LocalWorker, held: HeldGenerator, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    metrics = LlmMetrics()
    http = OpenAiHttp(metrics, lambda: (True, {}), RequestTracker(metrics, RunningCalls()))
    http.open(replace(worker.served, generator=held))  # type: ignore[arg-type]
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {"prompt": "Hello"}
    body = {"model": worker.served.name, **prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with (
        asyncio.timeout(20),
        TestClient(TestServer(http.application())) as client,
        client.post(path, json=body) as response,
    ):
        yield response
    await worker.until_idle()


async def next_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((await response.content.readuntil(b"\n\n")).removeprefix(b"data: "))
    return event


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_token_does_not_wait_for_the_next(worker: LocalWorker, path: str) -> None:
    held = HeldGenerator(worker.generator)
    async with streaming(worker, held, path) as response:
        if "chat" in path:
            assert (await next_event(response))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        first = (await next_event(response))["choices"][0]
        assert (len(first["token_ids"]), first["finish_reason"]) == (1, None)
        held.go_on.set()
        rest = [(await next_event(response))["choices"][0] for _ in range(4)]
        assert [each["finish_reason"] for each in rest] == [None, None, None, "length"]
        assert [len(each["token_ids"]) for each in rest] == [1, 1, 1, 0]
        assert await response.content.read() == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(EncoderUnavailable("the encoder was lost"), "encoder_unavailable"), (RuntimeError("secret"), "internal_error")],
)
async def test_an_error_after_the_first_token_is_the_last_event(
    worker: LocalWorker, error: Exception, code: str
) -> None:
    held = HeldGenerator(worker.generator, error)
    held.go_on.set()
    async with streaming(worker, held, "/v1/completions") as response:
        assert response.status == 200
        assert (await next_event(response))["choices"][0]["token_ids"]
        last = (await next_event(response))["error"]
        assert (last["code"], last["type"]) == (code, "server_error")
        assert "secret" not in last["message"]
        assert await response.content.read() == b""
