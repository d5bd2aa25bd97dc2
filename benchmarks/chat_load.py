"""A load client for OpenAI-compatible chat endpoints: `python -m benchmarks.chat_load --url http://127.0.0.1:8000`.

It keeps a number of requests in flight, each with a random picture and random text, streams the answers and prints a
Markdown table. TTFT is from sending the request to its first token, ITL from one piece of an answer to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import string
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks.pictures import parse_size, random_jpegs
from benchmarks.report import Row, table
from vitrine_vlm.deploy.launcher.ask import AskFailed, served_model, server_sent_events

# An answer that stalls fails instead of blocking the measurement.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
_FEW_WORDS, _MANY_WORDS = 16, 272


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds until its first token, seconds between its pieces, number of tokens."""

    ttft_s: float
    itl_s: list[float]
    num_tokens: int


@dataclass(frozen=True)
class Load:
    """The results of many requests."""

    seconds: float
    answers: list[Answer]
    failures: list[str]

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.seconds

    def ttft_ms(self, percentile: float) -> float:
        return _percentile_ms([answer.ttft_s for answer in self.answers], percentile)

    def itl_ms(self, percentile: float) -> float:
        return _percentile_ms([gap_s for answer in self.answers for gap_s in answer.itl_s], percentile)


class ChatClient:
    """Sends requests to one endpoint. Create it with `connected`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._model = model
        self._tokens_per_word = 1.0
        self._rng = random.Random(0)

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str, model: str | None = None) -> AsyncIterator[ChatClient]:
        """Connects to an endpoint inside the context.

        Args:
            url: the server's URL, without /v1.
            model: the name of the model; by default the first that is served.

        Raises:
            AskFailed: the endpoint refuses plain text.
        """
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
            client = cls(session, url, model or await served_model(url))
            few, many = [await client._num_prompt_tokens(num) for num in (_FEW_WORDS, _MANY_WORDS)]
            client._tokens_per_word = (many - few) / (_MANY_WORDS - _FEW_WORDS)
            yield client

    def body(self, num_text_tokens: int, max_tokens: int, *jpegs: bytes) -> bytes:
        """Returns a greedy request with these pictures and random text of about this many tokens.

        Servers that support `ignore_eos` do not end the answer early.
        """
        text = self._text(max(1, round(num_text_tokens / self._tokens_per_word)))
        urls = [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in jpegs]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": text})
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        return self._encoded(content, max_tokens, options)

    async def ask(self, body: bytes) -> Answer:
        """Sends a request and reads the streamed answer.

        Raises:
            AskFailed: the server answered with an error, or the answer ended with one.
            aiohttp.ClientError: the connection failed.
        """
        start = time.perf_counter()
        arrivals: list[float] = []
        num_tokens: int | None = None
        # As a file, because the bytes of a large picture would be sent at once and delay all other answers.
        async with self._session.post(
            self._url, data=io.BytesIO(body), headers={"content-type": "application/json"}
        ) as response:
            if response.status != 200:
                raise AskFailed(f"HTTP {response.status}: {(await response.text())[:500]}")
            async for chunk in server_sent_events(response):
                now = time.perf_counter()
                if "error" in chunk:
                    raise AskFailed(str(chunk["error"]))
                if any(_brings_tokens(choice) for choice in chunk.get("choices", [])):
                    arrivals.append(now)
                if usage := chunk.get("usage"):
                    num_tokens = usage["completion_tokens"]
        if not arrivals:
            raise AskFailed("the answer had no tokens")
        itl_s = [after - before for before, after in itertools.pairwise(arrivals)]
        return Answer(arrivals[0] - start, itl_s, len(arrivals) if num_tokens is None else num_tokens)

    async def _num_prompt_tokens(self, num_words: int) -> int:
        body = self._encoded([{"type": "text", "text": self._text(num_words)}], 1, {})
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                raise AskFailed(f"HTTP {response.status}: {await response.text()}")
            return int((await response.json())["usage"]["prompt_tokens"])

    def _text(self, num_words: int) -> str:
        return " ".join(self._rng.choices(string.ascii_lowercase, k=num_words))

    def _encoded(self, content: list[dict[str, Any]], max_tokens: int, options: dict[str, Any]) -> bytes:
        messages = [{"role": "user", "content": content}]
        body = {"model": self._model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return json.dumps(body | options).encode()


async def run_load(client: ChatClient, bodies: Iterable[bytes], concurrency: int) -> Load:
    """Sends all requests, `concurrency` at a time: when one answer ends, the next request is sent."""
    waiting = iter(bodies)
    answers: list[Answer] = []
    failures: list[str] = []

    async def ask_in_turn() -> None:
        for body in waiting:
            try:
                answers.append(await client.ask(body))
            except (AskFailed, aiohttp.ClientError, TimeoutError) as error:
                failures.append(f"{type(error).__name__}: {error}")

    start = time.perf_counter()
    await asyncio.gather(*(ask_in_turn() for _ in range(concurrency)))
    return Load(time.perf_counter() - start, answers, failures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="URL of the server, without /v1")
    parser.add_argument("--model", help="name of the model; default: the first that is served")
    parser.add_argument("--num-prompts", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight; default: %(default)s")
    parser.add_argument("--image-size", type=parse_size, default=(560, 560), help="WIDTHxHEIGHT; default: 560x560")
    parser.add_argument(
        "--num-images", type=int, help="different pictures, sent in turn; 0: text only; default: all differ"
    )
    parser.add_argument("--text-tokens", type=int, default=128, help="text tokens of a prompt; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=1, help="tokens of an answer; default: %(default)s")
    try:
        load = asyncio.run(_measure(parser.parse_args(arguments)))
    except (AskFailed, aiohttp.ClientError) as error:
        print(error, file=sys.stderr)
        return 1
    for failure in load.failures[:5]:
        print(failure, file=sys.stderr)
    print(table(load_rows(load)))
    return 1 if load.failures else 0


def load_rows(load: Load) -> list[Row]:
    """Returns all figures of a load."""
    rows = [Row("failures", str(len(load.failures)), "0")]
    if load.answers:
        rows += [
            Row("requests/s", f"{load.requests_per_s:.2f}"),
            Row("TTFT, ms, median / p99", f"{load.ttft_ms(50):.1f} / {load.ttft_ms(99):.1f}"),
            Row("output tokens/s", f"{load.tokens_per_s:.1f}"),
        ]
    if any(answer.itl_s for answer in load.answers):
        rows.append(Row("ITL, ms, median / p99", f"{load.itl_ms(50):.2f} / {load.itl_ms(99):.2f}"))
    return rows


async def _measure(options: argparse.Namespace) -> Load:
    num_images = options.num_prompts if options.num_images is None else options.num_images
    jpegs = random_jpegs(num_images, options.image_size)
    pictures = itertools.islice(itertools.cycle([(jpeg,) for jpeg in jpegs] or [()]), options.num_prompts)
    async with ChatClient.connected(options.url, options.model) as client:
        bodies = [client.body(options.text_tokens, options.max_tokens, *picture) for picture in pictures]
        return await run_load(client, bodies, options.concurrency)


def _percentile_ms(seconds: list[float], percentile: float) -> float:
    return float(np.percentile(seconds, percentile)) * 1000


def _brings_tokens(choice: dict[str, Any]) -> bool:
    """Whether the piece has tokens, unlike the first one with the role and the last one with the finish reason."""
    delta = choice.get("delta", {})
    return bool(delta.get("content")) or ("role" not in delta and choice.get("finish_reason") is None)


if __name__ == "__main__":
    sys.exit(main())
