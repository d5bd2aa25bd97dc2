"""Picture requests in flight on a server while something else is measured there.

A process of its own sends them, so that sending does not delay the measuring process. It draws the pictures, prints
"drawn", reads the server's URL, prints "begun", sends requests until it reads an empty line, and prints its result.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from benchmarks.chat_load import ChatClient, run_load
from benchmarks.compare.drawn_pictures import draw_pictures
from benchmarks.line_process import LineProcess
from benchmarks.pictures import parse_size, show_size

_NUM_PICTURES = 1024  # different ones, sent in turn; a load of a minute sends fewer, so that no cache can answer


@dataclass(frozen=True)
class InterferenceResult:
    """How the requests ended; `failures` are the reasons of those that failed."""

    requests_per_s: float
    failures: list[str]


class VisionInterference:
    """A running process. Create it with `started`."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def started(
        cls, size: tuple[int, int], in_flight: int, text_tokens: int, seed: int = 2
    ) -> AsyncIterator[VisionInterference]:
        """Starts the process, which begins to draw its pictures.

        Args:
            size: (width, height) of the pictures, pixels.
            in_flight: the number of requests in flight, each with one picture, text and one token of answer.
            text_tokens: the tokens of each prompt's text.
            seed: of the pictures; another one gives others.
        """
        options = [show_size(size), str(in_flight), str(text_tokens), str(seed)]
        async with LineProcess.started("benchmarks.vision_interference", *options) as process:
            yield cls(process)

    async def wait_ready(self) -> None:
        await self._process.read_line()

    async def start(self, url: str) -> None:
        await self._process.send_line(url)
        await self._process.read_line()

    async def stop(self) -> InterferenceResult:
        """Sends no more requests and waits for those in flight."""
        await self._process.send_line("")
        return InterferenceResult(**json.loads(await self._process.read_line()))


async def _interfere(size: tuple[int, int], in_flight: int, text_tokens: int, seed: int) -> None:
    pictures = draw_pictures(_NUM_PICTURES, size, seed << 16)
    print("drawn", flush=True)
    url = (await asyncio.to_thread(sys.stdin.readline)).strip()
    if not url:
        return
    async with ChatClient.connected(url) as client:
        bodies = [client.body(text_tokens, 1, picture) for picture in pictures]
        print("begun", flush=True)
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        load = await run_load(
            client, itertools.takewhile(lambda _: not ended.done(), itertools.cycle(bodies)), in_flight
        )
    print(json.dumps(asdict(InterferenceResult(load.requests_per_s, load.failures))), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=parse_size, help="WIDTHxHEIGHT of the pictures")
    parser.add_argument("in_flight", type=int, help="requests")
    parser.add_argument("text_tokens", type=int, help="of a prompt")
    parser.add_argument("seed", type=int, help="of the pictures")
    options = parser.parse_args(arguments)
    asyncio.run(_interfere(options.size, options.in_flight, options.text_tokens, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
