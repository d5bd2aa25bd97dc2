"""A client process of encoders in place of a worker: it sends JPEGs and lands the rows in its own buffers.

`benchmarks.encoder_service` runs several, which begin at the same time. For each `Load`, a line of JSON on stdin, a
client prints a line once it is warm, begins when it reads an empty line, and prints what it `Measured`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.line_process import LineProcess
from benchmarks.pictures import random_jpegs
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice
from vitrine_vlm.types import MediaItem, RowsEvent

_WARM_UP = 64
_NUM_PICTURES = 16  # sent in turn, each time with another comment in the file
_NUM_DEEPSTACK, _HIDDEN = 3, 4096
_MAX_TOKENS = 8192
_WARM = "warm"


@dataclass(frozen=True)
class Load:
    """Requests to the encoders at `addresses`; `width` and `height` of the pictures are in pixels."""

    addresses: list[str]
    transport: TransportChoice
    width: int
    height: int
    requests: int
    in_flight: int


class LoadClient:
    """A client process. Create it with `started`."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def started(cls, seed: int, gpu: int) -> AsyncIterator[LoadClient]:
        """Starts the process inside the context.

        Args:
            seed: different for each client, so that their pictures differ.
            gpu: the GPU on which it lands rows.
        """
        options = ["--seed", str(seed), "--gpu", str(gpu)]
        async with LineProcess.started("benchmarks.encoder_load", *options) as process:
            yield cls(process)

    async def warm_up(self, load: Load) -> None:
        """Sends a load, and waits until the client is warm.

        Raises:
            RuntimeError: the client ended.
        """
        await self._process.send_line(json.dumps(dataclasses.asdict(load)))
        await self._process.read_line()

    async def measure(self) -> Measured:
        """Starts the load, and returns its results.

        Raises:
            RuntimeError: the client ended.
        """
        await self._process.send_line("")
        return Measured(**json.loads(await self._process.read_line()))


@dataclass
class Measured:
    """The results of a load. `start` and `stop` are on the host's monotonic clock, in seconds.

    Delivery is the time that both sides spend on complete rows; the transfer of messages between them is only in the
    time of the whole request. stages_ms: preprocess, queue, forward.
    """

    start: float = 0.0
    stop: float = 0.0
    nbytes: int = 0
    request_ms: list[float] = field(default_factory=list)
    delivery_ms: list[float] = field(default_factory=list)
    stages_ms: list[tuple[float, float, float]] = field(default_factory=list)


class _Landing:
    """A worker's input buffers."""

    def __init__(self, gpu: int) -> None:
        self.gpu = torch.device("cuda", gpu) if torch.cuda.is_available() else None
        self._main = torch.empty((_MAX_TOKENS, _HIDDEN), dtype=torch.bfloat16, device=self.gpu)
        self._deepstack = torch.empty((_NUM_DEEPSTACK, _MAX_TOKENS, _HIDDEN), dtype=torch.bfloat16, device=self.gpu)

    def land(self, event: RowsEvent, asked: float, measured: Measured) -> None:
        rows, timings = event.rows, event.rows.timings
        start = time.perf_counter()
        rows.copy_to(self._main[: rows.num_tokens], self._deepstack[:, : rows.num_tokens], 0)
        check = rows.queue_check()
        if self.gpu is not None:
            torch.cuda.current_stream(self.gpu).synchronize()
        check()
        rows.release()
        landed = time.perf_counter()
        land_ms = (landed - start) * 1000
        measured.request_ms.append((landed - asked) * 1000)
        measured.delivery_ms.append(timings.export_ms + timings.ship_ms + land_ms)
        measured.stages_ms.append((timings.preprocess_ms, timings.queue_ms, timings.forward_ms))
        measured.nbytes += rows.num_tokens * (1 + _NUM_DEEPSTACK) * _HIDDEN * 2


async def _serve(seed: int, gpu: int) -> None:
    landing = _Landing(gpu)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await _measure(seed, Load(**json.loads(line)), landing)


async def _measure(seed: int, load: Load, landing: _Landing) -> None:
    pictures = random_jpegs(_NUM_PICTURES, (load.width, load.height), seed)
    client = EncoderClient(load.addresses, None, transport=load.transport, gpu=landing.gpu)
    await client.start()
    await _ask_all(client, pictures, landing, Measured(), _WARM_UP, load.in_flight)
    print(_WARM, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    measured = Measured(start=time.monotonic())
    await _ask_all(client, pictures, landing, measured, load.requests, load.in_flight)
    measured.stop = time.monotonic()
    await client.close()
    print(json.dumps(dataclasses.asdict(measured)), flush=True)


async def _ask_all(
    client: EncoderClient,
    pictures: list[bytes],
    landing: _Landing,
    measured: Measured,
    num_requests: int,
    in_flight: int,
) -> None:
    room = asyncio.Semaphore(in_flight)

    async def ask(index: int) -> None:
        async with room:
            # Equal items in flight would be encoded once.
            item = MediaItem("image", data=_with_comment(pictures[index % len(pictures)], index))
            asked = time.perf_counter()
            async with aclosing(client.encode([item], str(index))) as events:
                async for event in events:
                    if isinstance(event, RowsEvent):
                        landing.land(event, asked, measured)

    await asyncio.gather(*(ask(index) for index in range(num_requests)))


def _with_comment(jpeg: bytes, number: int) -> bytes:
    """Returns another file of the same picture: with a comment segment of 8 bytes behind the start marker."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=int, required=True, help="different for each client, so that their pictures differ"
    )
    parser.add_argument("--gpu", type=int, default=0, help="GPU on which rows are landed, if there is one")
    options = parser.parse_args(arguments)
    asyncio.run(_serve(options.seed, options.gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
