"""Users: chats about pictures, through a Service, sent again as docs/errors.md says."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.accuracy.answering import chat_body
from benchmarks.accuracy.questions import AskedQuestion
from vitrine_vlm.deploy.launcher.ask import server_sent_events

# Of docs/errors.md those for which it says "try again"; a lost connection is one, too. As often as OpenAI's clients do.
_TRY_AGAIN = {
    *("overloaded", "worker_unavailable", "encoder_unavailable", "prefill_unavailable"),
    *("lease_expired", "ticket_expired"),
}
_MAX_TRIES, _PAUSE_S = 3, 0.5
_TIMEOUT = aiohttp.ClientTimeout(total=60.0)


@dataclass(frozen=True)
class Outcome:
    """One request of a user. at: seconds of `time.monotonic` at its start. seconds: until its answer, with all tries.

    tries: what the tries before the last one ended with. error: of the last one; None if it was answered.
    is_wrong: whether the answer is another one than the first of the same question.
    """

    at: float
    seconds: float
    tries: tuple[str, ...]
    error: str | None
    is_wrong: bool


class TryFailed(RuntimeError):
    """An answer with an error. may_repeat: whether to try again, after `pause_s`."""

    def __init__(self, where: str, error: dict[str, Any], pause_s: float = _PAUSE_S) -> None:
        super().__init__(f"{where}: {error['message']}")
        self.may_repeat = error["code"] in _TRY_AGAIN
        self.pause_s = pause_s


class Users:
    """Users who ask one question after the other. Create them with `asking`.

    outcomes: of their requests, in the order of their ends.
    """

    def __init__(self, url: str, model: str, questions: Sequence[AskedQuestion]) -> None:
        self.outcomes: list[Outcome] = []
        self._url = f"{url}/v1/chat/completions"
        # Bodies of every second request stream.
        self._bodies = [chat_body(model, each) | {"stream": bool(i % 2)} for i, each in enumerate(questions)]
        self._answers: dict[int, str] = {}

    @classmethod
    @asynccontextmanager
    async def asking(
        cls,
        resolver: aiohttp.abc.AbstractResolver,
        url: str,
        model: str,
        questions: Sequence[AskedQuestion],
        count: int,
        pause_s: float,
    ) -> AsyncIterator[Users]:
        """
        Args:
            count: of users, each of whom pauses for `pause_s` behind each answer.
        """
        users = cls(url, model, questions)
        stopped = asyncio.Event()
        indices = itertools.cycle(range(len(questions)))

        async def keep_asking(session: aiohttp.ClientSession) -> None:
            while not stopped.is_set():
                await users._request(session, next(indices))
                await asyncio.sleep(pause_s)

        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(count):
                group.create_task(keep_asking(session))
            try:
                yield users
            finally:
                stopped.set()

    async def _request(self, session: aiohttp.ClientSession, index: int) -> None:
        at = time.monotonic()
        failures: list[str] = []
        answer = None
        while answer is None and len(failures) < _MAX_TRIES:
            try:
                answer = await self._try(session, self._bodies[index])
            except (TryFailed, aiohttp.ClientError, OSError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                if isinstance(error, TryFailed) and not error.may_repeat:
                    break
                await asyncio.sleep(error.pause_s if isinstance(error, TryFailed) else _PAUSE_S)
        is_wrong = answer is not None and answer != self._answers.setdefault(index, answer)
        last = failures.pop() if answer is None else None
        self.outcomes.append(Outcome(at, time.monotonic() - at, tuple(failures), last, is_wrong))

    async def _try(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        """
        Raises:
            TryFailed: the answer is an error, or ends with one.
            aiohttp.ClientError, OSError: the connection was lost, or none was made.
        """
        async with session.post(self._url, json=body) as response:
            if response.status != 200:
                pause_s = float(response.headers.get("Retry-After", _PAUSE_S))
                raise TryFailed(f"HTTP {response.status}", (await response.json())["error"], pause_s)
            if not body["stream"]:
                return str((await response.json())["choices"][0]["message"]["content"])
            text, finish_reason = "", None
            async for chunk in server_sent_events(response):
                if "error" in chunk:
                    raise TryFailed("in the stream", chunk["error"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish_reason = choice["finish_reason"] or finish_reason
            if finish_reason is None:
                raise aiohttp.ClientPayloadError(f"a stream without an end, after {text!r}")
            return text
