"""Asks one question about one picture over the OpenAI HTTP endpoint, as any client would."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)


class AskFailed(RuntimeError):
    """The worker answered with an error."""


@dataclass(frozen=True)
class Answer:
    """The end and the timing of one streamed answer.

    finish_reason: "stop" or "length".
    timings_ms: the worker's times by stage, in milliseconds.
    ttft_ms, total_ms: measured by the client, in milliseconds.
    """

    finish_reason: str | None
    usage: dict[str, int]
    timings_ms: dict[str, float]
    ttft_ms: float
    total_ms: float


async def served_model(base_url: str) -> str:
    """Returns the name under which the worker serves its model."""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(f"{base_url}/v1/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


async def ask(base_url: str, picture_url: str, prompt: str, *, max_tokens: int, show: Callable[[str], None]) -> Answer:
    """Streams the answer and calls `show` with every piece of text as it arrives.

    Raises:
        AskFailed: the worker refused the question; with its message.
    """
    content = [{"type": "image_url", "image_url": {"url": picture_url}}, {"type": "text", "text": prompt}]
    body = {
        "model": await served_model(base_url),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    finish_reason, ttft_ms = None, 0.0
    usage: dict[str, int] = {}
    timings_ms: dict[str, float] = {}
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        start = time.perf_counter()
        async with session.post(f"{base_url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise AskFailed(f"HTTP {response.status}: {await response.text()}")
            async for chunk in server_sent_events(response):
                if "error" in chunk:
                    raise AskFailed(str(chunk["error"].get("message", chunk["error"])))
                for choice in chunk.get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    if piece:
                        ttft_ms = ttft_ms or _ms_since(start)
                        show(piece)
                    finish_reason = choice.get("finish_reason") or finish_reason
                usage = chunk.get("usage") or usage
                timings_ms = chunk.get("timings") or timings_ms
        return Answer(finish_reason, usage, timings_ms, ttft_ms, _ms_since(start))


async def server_sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yields the JSON objects of a server-sent event stream, up to [DONE]."""
    async for line in response.content:
        if line.startswith(b"data: "):
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
