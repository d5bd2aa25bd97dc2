"""Pictures that pour into a server while something else is measured there.

A process of its own, because sending them would delay whoever takes the time. It draws its pictures, says so, begins
when it gets the server's URL, says so, ends with an empty line, and says what came of it.
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
from benchmarks.line_process import LineProcess
from benchmarks.pictures import parse_size, random_jpegs, show_size

_NUM_PICTURES = 256  # different ones, asked in turn: at full size more than are asked for, so that no cache answers
_SEED = 2


@dataclass(frozen=True)
class Poured:
    """What came of the requests; failures: their reasons."""

    requests_per_s: float
    failures: list[str]


class Pouring:
    """Make it with `drawing`."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def drawing(cls, size: tuple[int, int], in_flight: int, text_tokens: int) -> AsyncIterator[Pouring]:
        """
        Args:
            size: (width, height) of the pictures, pixels.
            in_flight: requests, each with one picture, text and one token of answer.
        """
        options = [show_size(size), str(in_flight), str(text_tokens)]
        async with LineProcess.started("benchmarks.pouring", *options) as process:
            yield cls(process)

    async def drawn(self) -> None:
        await self._process.hear()

    async def begin(self, url: str) -> None:
        await self._process.say(url)
        await self._process.hear()

    async def end(self) -> Poured:
        """Asks nothing more, and waits for what is in flight."""
        await self._process.say("")
        return Poured(**json.loads(await self._process.hear()))


async def _pour(size: tuple[int, int], in_flight: int, text_tokens: int) -> None:
    pictures = random_jpegs(_NUM_PICTURES, size, _SEED)
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
    print(json.dumps(asdict(Poured(load.requests_per_s, load.failures))), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=parse_size, help="WIDTHxHEIGHT of the pictures")
    parser.add_argument("in_flight", type=int, help="requests")
    parser.add_argument("text_tokens", type=int, help="of a prompt")
    options = parser.parse_args(arguments)
    asyncio.run(_pour(options.size, options.in_flight, options.text_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
