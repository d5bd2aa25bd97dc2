"""Measures a whole encoder: JPEG bytes in over gRPC, rows landed in another process's buffers.

`python -m benchmarks.encoder_service` starts a real encoder of Qwen3-VL-8B's dims with dummy weights; client processes
in place of workers keep many requests in flight. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import product
from pathlib import Path

import torch

from benchmarks.checkpoints import save_qwen3_vl_8b
from benchmarks.encoder_load import Load, LoadClient
from benchmarks.pictures import parse_size, show_size
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice

_POOL_NBYTES = 6 << 30
_PORT = 50151  # of the first of several encoders
_MAX_QUEUED_PATCHES = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=512, help="requests of each size; default: %(default)s")
    parser.add_argument(
        "--in-flight", nargs="+", type=int, default=[1, 64], help="requests in flight; default: %(default)s"
    )
    parser.add_argument("--transports", nargs="+", default=["cuda_ipc", "grpc"], help="default: %(default)s")
    sizes = ["560x560", "1920x1080"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="WIDTHxHEIGHT each; default: %(default)s")
    parser.add_argument("--dp", type=int, default=1, help="encoders, one per GPU; default: %(default)s")
    parser.add_argument("--clients", type=int, help="client processes; default: two per encoder")
    parser.add_argument("--encoder-flags", nargs="*", default=[], help="more flags for the encoder, without dashes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(save_qwen3_vl_8b(Path(folder)), options))
    return 0


async def _measure(checkpoint: Path, options: argparse.Namespace) -> None:
    times = "request, ms, p50 / p99 | delivery, ms, p50 / p99 | preprocess, queue, forward, ms"
    print(f"| size | transport | in flight | img/s | MB/s | {times} |")
    print("|---|---|---|---|---|---|---|---|")
    async with AsyncExitStack() as stack:
        num_gpus = max(1, torch.cuda.device_count())
        # Clients have their own GPUs, as far as there are enough.
        gpus = list(range(options.dp, num_gpus)) or list(range(num_gpus))
        clients = [
            await stack.enter_async_context(LoadClient.started(seed, gpus[seed % len(gpus)]))
            for seed in range(options.clients or 2 * options.dp)
        ]
        flags = [f"--{flag}" for flag in options.encoder_flags]
        addresses = await stack.enter_async_context(_encoders(checkpoint, options.dp, flags))
        sizes = map(parse_size, options.sizes)
        for transport, size, in_flight in product(options.transports, sizes, options.in_flight):
            num_requests = options.requests if in_flight > 1 else options.requests // 8
            print(await _row(clients, addresses, transport, size, num_requests, in_flight), flush=True)


async def _row(
    clients: list[LoadClient],
    addresses: list[str],
    transport: TransportChoice,
    size: tuple[int, int],
    num_requests: int,
    in_flight: int,
) -> str:
    asking = clients[: min(len(clients), in_flight)]
    load = Load(addresses, transport, *size, num_requests // len(asking), in_flight // len(asking))
    await asyncio.gather(*(client.warm_up(load) for client in asking))
    all_measured = await asyncio.gather(*(client.measure() for client in asking))
    seconds = max(each.stop for each in all_measured) - min(each.start for each in all_measured)
    request_ms = [time for each in all_measured for time in each.request_ms]
    delivery_ms = [time for each in all_measured for time in each.delivery_ms]
    all_stages_ms = [times for each in all_measured for times in each.stages_ms]
    stages = ", ".join(f"{statistics.median(times):.1f}" for times in zip(*all_stages_ms, strict=True))
    rate, mb_per_s = len(request_ms) / seconds, sum(each.nbytes for each in all_measured) / seconds / 1e6
    figures = f"{rate:.1f} | {mb_per_s:.0f} | {_percentiles(request_ms)} | {_percentiles(delivery_ms)} | {stages}"
    return f"| {show_size(size)} | {transport} | {in_flight} | {figures} |"


def _percentiles(times_ms: list[float]) -> str:
    ordered = sorted(times_ms)
    return f"{statistics.median(ordered):.2f} / {ordered[int(0.99 * len(ordered))]:.2f}"


@asynccontextmanager
async def _encoders(checkpoint: Path, dp: int, flags: list[str]) -> AsyncIterator[list[str]]:
    """Runs real encoder processes; yields their addresses."""
    command = [sys.executable, "-m", "vitrine_vlm.encoder_service", "--model", str(checkpoint), "--dtype", "bfloat16"]
    command += ["--load-format", "dummy", "--dp", str(dp), "--port", str(_PORT if dp > 1 else 0)]
    command += ["--cuda-ipc-pool-bytes", str(_POOL_NBYTES)]
    command += ["--cache-gpu-bytes", "0", "--cache-host-bytes", "0"]  # equal pictures must be encoded again
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
        raise RuntimeError("the encoder ended while it started: see its output above")
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
