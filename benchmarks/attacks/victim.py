"""A client that sends what clients usually send, and measures how long it waits."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

_SIDE = 224
_HEALTH_EVERY_S = 0.05
_TIMEOUT = aiohttp.ClientTimeout(total=60.0)


@dataclass
class Waits:
    """Seconds from request to end of answer by kind: "text", "picture" and "health"; what was not answered with 200."""

    of: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "picture": [], "health": []})
    failures: Counter[str] = field(default_factory=Counter)

    def percentile_ms(self, kind: str, percent: float) -> float:
        return float(np.percentile(self.of[kind], percent)) * 1e3 if self.of[kind] else float("nan")


class Victim:
    """Sends a small picture and a text in every period, and asks for /health, at fixed times.

    Args:
        url: of the worker or the gateway, without /v1.
        every_s: the period, seconds.
    """

    def __init__(self, url: str, model: str, every_s: float) -> None:
        self._url = url
        self._model = model
        self._every_s = every_s
        self._numbers = itertools.count()

    async def run(self, seconds: float) -> Waits:
        """Sends for a time, and waits for all answers."""
        waits = Waits()
        connector = aiohttp.TCPConnector(limit=0)
        session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)
        async with session, asyncio.TaskGroup() as group:
            for kind, body in (("text", self._text), ("picture", self._picture)):
                group.create_task(self._at_times(waits, kind, self._every_s, seconds, self._chat(session, body)))
            group.create_task(self._at_times(waits, "health", _HEALTH_EVERY_S, seconds, self._health(session)))
        return waits

    async def _at_times(
        self, waits: Waits, kind: str, every_s: float, seconds: float, send: Callable[[], Awaitable[int]]
    ) -> None:
        async def request() -> None:
            begin = time.monotonic()
            try:
                if (status := await send()) != 200:
                    waits.failures[f"{kind}: HTTP {status}"] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                waits.failures[f"{kind}: {type(error).__name__}"] += 1
            waits.of[kind].append(time.monotonic() - begin)

        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds / every_s)):
                await asyncio.sleep(begin + number * every_s - time.monotonic())
                group.create_task(request())

    def _chat(self, session: aiohttp.ClientSession, body: Callable[[], Any]) -> Callable[[], Awaitable[int]]:
        async def send() -> int:
            messages = [{"role": "user", "content": body()}]
            chat = {"model": self._model, "messages": messages, "max_tokens": 8, "temperature": 0}
            async with session.post(f"{self._url}/v1/chat/completions", json=chat) as response:
                await response.read()
                return response.status

        return send

    def _health(self, session: aiohttp.ClientSession) -> Callable[[], Awaitable[int]]:
        async def send() -> int:
            async with session.get(f"{self._url}/health") as response:
                await response.read()
                return response.status

        return send

    def _text(self) -> str:
        return f"What is {next(self._numbers)}?"

    def _picture(self) -> list[dict[str, Any]]:
        """Another picture each time, which no cache knows."""
        file = io.BytesIO()
        coarse = np.random.default_rng(next(self._numbers)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((_SIDE, _SIDE)).save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
