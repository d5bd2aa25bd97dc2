"""The requests of a soak: held-out questions about pictures and videos, whose answers are compared."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.accuracy.answering import chat_body
from benchmarks.accuracy.questions import AskedQuestion
from vitrine_vlm.deploy.launcher.ask import AskFailed, served_model, server_sent_events

# Of the requests: parts that are streamed, that ask about one and the same picture, and whose client leaves early.
_STREAMED, _VIRAL, _ABANDONED = 0.5, 0.1, 0.05
_LONGEST_STAY_S = 0.3
_TIMEOUT = aiohttp.ClientTimeout(total=60.0)


@dataclass(frozen=True)
class Outcome:
    """One request. at: seconds of `time.monotonic` at its start. error: why it failed; None if it did not.

    differs: whether its answer is another one than in the quiet. abandoned: whether its client left before the end.
    """

    at: float
    seconds: float
    error: str | None = None
    differs: bool = False
    abandoned: bool = False


class SoakLoad:
    """Sends requests through the gateway, and keeps what became of each in `outcomes`.

    Args:
        session: with as many connections as there are requests in flight.
        seed: of the choice of requests and of their arrivals.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, questions: Sequence[AskedQuestion], seed: int
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._bodies = [chat_body(model, question) for question in questions]
        self._answers: list[str] = []
        self._random = random.Random(seed)

    @classmethod
    async def prepared(
        cls, session: aiohttp.ClientSession, url: str, questions: Sequence[AskedQuestion], seed: int
    ) -> SoakLoad:
        """Asks each question once, one after the other: later answers must be the same.

        Raises:
            AskFailed: a question was refused.
        """
        load = cls(session, url, await served_model(url), questions, seed)
        for body in load._bodies:
            load._answers.append(await load._ask(body))
        return load

    @property
    def answers(self) -> list[str]:
        """The answers in the quiet, in the order of the questions."""
        return self._answers

    async def run_closed(self, in_flight: int, seconds: float) -> float:
        """Keeps requests in flight for a time; returns the number that was answered a second."""
        end = time.monotonic() + seconds
        before = len(self.outcomes)

        async def keep_asking() -> None:
            while time.monotonic() < end:
                await self._request()

        await asyncio.gather(*(keep_asking() for _ in range(in_flight)))
        return sum(each.error is None for each in self.outcomes[before:]) / seconds

    async def run_open(self, requests_per_s: float, seconds: float) -> None:
        """Starts requests at random times, whatever became of those before, and waits for the last."""
        end = time.monotonic() + seconds
        next_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (next_at := next_at + self._random.expovariate(requests_per_s)) < end:
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))
                group.create_task(self._request())

    async def _request(self) -> None:
        index = 0 if self._random.random() < _VIRAL else self._random.randrange(len(self._bodies))
        stay_s = self._random.uniform(0, _LONGEST_STAY_S) if self._random.random() < _ABANDONED else None
        at = time.monotonic()
        error, differs, abandoned = None, False, False
        try:
            async with asyncio.timeout(stay_s):
                answer = await self._ask(self._bodies[index] | {"stream": self._random.random() < _STREAMED})
            differs = answer != self._answers[index]
        except TimeoutError as failure:
            abandoned = stay_s is not None
            error = None if abandoned else f"timeout: {failure!r}"
        except (AskFailed, aiohttp.ClientError, OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.outcomes.append(Outcome(at, time.monotonic() - at, error, differs, abandoned))

    async def _ask(self, body: dict[str, Any]) -> str:
        """
        Raises:
            AskFailed: the answer is an error, or ends with one.
            aiohttp.ClientError, OSError: the connection failed.
        """
        async with self._session.post(self._url, json=body, timeout=_TIMEOUT) as response:
            if response.status != 200:
                raise AskFailed(f"HTTP {response.status}: {await response.text()}")
            if not body.get("stream"):
                return str((await response.json())["choices"][0]["message"]["content"])
            text, finish_reason = "", None
            async for chunk in server_sent_events(response):
                if "error" in chunk:
                    raise AskFailed(f"in the stream: {json.dumps(chunk)}")
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish_reason = choice["finish_reason"] or finish_reason
            if finish_reason is None:
                raise AskFailed(f"a stream without an end, after {text!r}")
            return text
