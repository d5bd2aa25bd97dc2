"""What a whole encoder delivers: JPEG bytes in over gRPC, rows landed in another process's buffers.

`python -m benchmarks.encoder_service` starts a real encoder of Qwen3-VL-8B's dims with dummy weights and asks it with
many requests in flight; this process plays the worker. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import torch

from benchmarks.checkpoints import save_qwen3_vl_8b
from benchmarks.pictures import random_jpegs
from embedding_transport.encoder_client import EncoderClient
from embedding_transport.row_peer import TransportChoice
from embedding_transport.types import MediaItem, RowsEvent

_SIZES = ((560, 560), (1920, 1080))
_WARM_UP = 64
_NUM_PICTURES = 16  # asked in turn, each time with another comment in its file
_NUM_DEEPSTACK, _HIDDEN = 3, 4096
_POOL_NBYTES = 6 << 30
_PORT = 50151  # of the first of several encoders
_MAX_QUEUED_PATCHES = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=512, help="of each size; default: %(default)s")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 64], help="requests; default: %(default)s")
    parser.add_argument("--transports", nargs="+", default=["cuda_ipc", "grpc"], help="default: %(default)s")
    parser.add_argument("--dp", type=int, default=1, help="encoders, one a GPU; default: %(default)s")
    parser.add_argument("--encoder-flags", nargs="*", default=[], help="more flags for the encoder, without dashes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(save_qwen3_vl_8b(Path(folder)), options))
    return 0


async def _measure(checkpoint: Path, options: argparse.Namespace) -> None:
    times = "request, ms, p50 / p99 | delivery, ms, p50 / p99 | preprocess, queue, forward, ms"
    print(f"| size | transport | in flight | img/s | MB/s | {times} |")
    print("|---|---|---|---|---|---|---|---|")
    async with _encoders(checkpoint, options.dp, [f"--{flag}" for flag in options.encoder_flags]) as addresses:
        for transport in options.transports:
            client = EncoderClient(addresses, None, transport=transport, takes_gpu_rows=True)
            await client.start()
            for size in _SIZES:
                for in_flight in options.in_flight:
                    num_requests = options.requests if in_flight > 1 else options.requests // 8
                    print(await _row(client, transport, size, num_requests, in_flight), flush=True)
            await client.close()


async def _row(
    client: EncoderClient, transport: TransportChoice, size: tuple[int, int], num_requests: int, in_flight: int
) -> str:
    pictures = random_jpegs(_NUM_PICTURES, size)
    landing = _Landing()
    await _ask_all(client, pictures, landing, _WARM_UP, in_flight)
    landing.clear()
    start = time.perf_counter()
    await _ask_all(client, pictures, landing, num_requests, in_flight)
    seconds = time.perf_counter() - start
    request, delivery = _percentiles(landing.request_ms), _percentiles(landing.delivery_ms)
    stages = ", ".join(f"{statistics.median(times):.1f}" for times in zip(*landing.stages_ms, strict=True))
    rate, mb_per_s = num_requests / seconds, landing.nbytes / seconds / 1e6
    figures = f"{rate:.1f} | {mb_per_s:.0f} | {request} | {delivery} | {stages}"
    return f"| {size[0]}x{size[1]} | {transport} | {in_flight} | {figures} |"


def _percentiles(times_ms: list[float]) -> str:
    ordered = sorted(times_ms)
    return f"{statistics.median(ordered):.2f} / {ordered[int(0.99 * len(ordered))]:.2f}"


async def _ask_all(
    client: EncoderClient, pictures: list[bytes], landing: _Landing, num_requests: int, in_flight: int
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
                        landing.land(event, asked)

    await asyncio.gather(*(ask(index) for index in range(num_requests)))


def _with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture in another file: a comment segment of 8 bytes behind the start marker."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


class _Landing:
    """A worker's input buffers, and what was measured on the way into them.

    Delivery is what either side spends on complete rows: a message's way between them is in the whole request only.
    """

    def __init__(self) -> None:
        # Where there are two GPUs, the worker has one of its own.
        device = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        self._main = torch.empty((8192, _HIDDEN), dtype=torch.bfloat16, device=device)
        self._deepstack = torch.empty((_NUM_DEEPSTACK, 8192, _HIDDEN), dtype=torch.bfloat16, device=device)
        self.clear()

    def clear(self) -> None:
        self.request_ms: list[float] = []
        self.delivery_ms: list[float] = []
        self.stages_ms: list[tuple[float, float, float]] = []
        self.nbytes = 0

    def land(self, event: RowsEvent, asked: float) -> None:
        rows, timings = event.rows, event.rows.timings
        start = time.perf_counter()
        rows.copy_to(self._main[: rows.num_tokens], self._deepstack[:, : rows.num_tokens], 0)
        rows.release()
        landed = time.perf_counter()
        land_ms = (landed - start) * 1000
        self.request_ms.append((landed - asked) * 1000)
        self.delivery_ms.append(timings.export_ms + timings.ship_ms + land_ms)
        self.stages_ms.append((timings.preprocess_ms, timings.queue_ms, timings.forward_ms))
        self.nbytes += rows.num_tokens * (1 + _NUM_DEEPSTACK) * _HIDDEN * 2


@asynccontextmanager
async def _encoders(checkpoint: Path, dp: int, flags: list[str]) -> AsyncIterator[list[str]]:
    """Real encoder processes; their addresses."""
    command = [sys.executable, "-m", "encoder_service", "--model", str(checkpoint), "--dtype", "bfloat16"]
    command += ["--load-format", "dummy", "--dp", str(dp), "--port", str(_PORT if dp > 1 else 0)]
    command += ["--cuda-ipc-pool-bytes", str(_POOL_NBYTES)]
    command += ["--cache-gpu-bytes", "0", "--cache-host-bytes", "0"]  # or equal pictures would not be encoded again
    command += ["--max-queued-patches", str(_MAX_QUEUED_PATCHES), *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.STDOUT, stdout=-1)
    assert process.stdout is not None
    addresses: list[str] = []
    num_serving = 0
    async for raw in process.stdout:
        line = raw.decode()
        if match := re.search(r"grpc=(\S+:\d+)", line):
            addresses.append(match[1])
        if "CUDA graphs," in line or "attention over" in line or "JPEG" in line:
            print(line.strip(), file=sys.stderr)
        num_serving += "SERVING " in line
        if num_serving == dp:
            break
    else:
        raise RuntimeError("the encoder ended at its start")
    drain = asyncio.create_task(_drain(process.stdout))
    try:
        yield addresses
    finally:
        process.terminate()
        await process.wait()
        drain.cancel()


async def _drain(stream: asyncio.StreamReader) -> None:
    async for raw in stream:
        print(raw.decode().rstrip(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
