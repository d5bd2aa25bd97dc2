"""Measures what connections of workers to encoders cost, with real encoders that have a tiny tower, on one machine.

    python -m benchmarks.connections --encoders 200 --workers 2

For each number of connections that a worker keeps: the time until it is ready and until these are connected, and what
they cost both sides, in CPU time, memory and files; then pictures of which none is equal to another, one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.attacks.memory import resident_mib
from benchmarks.line_process import LineProcess
from benchmarks.process_tree import cpu_seconds
from tests.encoder_service.running import image, png, run_encoder
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.peer_fleet import ConnectionPolicy
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint
from vitrine_vlm.types import RowsEvent

_NUM_SERVERS = 2  # processes that the encoders are spread over
_IDLE_S = 20.0
_PAUSE_S = 0.02
_SIDE = 64  # pixels of a picture


async def _read_line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


async def serve(number: int, folder: Path, shm_folder: Path) -> None:
    """Runs so many encoders and prints their addresses."""
    async with AsyncExitStack() as stack:
        encoders = [
            await stack.enter_async_context(run_encoder(folder, shm_folder, cache_bytes=1 << 20)) for _ in range(number)
        ]
        print(json.dumps([encoder.address for encoder in encoders]), flush=True)
        await _read_line()


async def work(shm_folder: Path) -> None:
    """A worker's client: connects, waits, and sends pictures, each at a line of its stdin."""
    print("imported", flush=True)
    addresses, num_kept, seed, num_pictures = json.loads(await _read_line())
    policy = ConnectionPolicy(num_kept=num_kept)
    client = EncoderClient(addresses, None, shm_folder=shm_folder, connect_timeout_s=60, connections=policy)
    begin = time.perf_counter()
    starting = asyncio.create_task(client.start())
    await client.wait_ready(60)
    ready_s = time.perf_counter() - begin
    await starting  # its end is that of the first attempts
    assert sum(status.ready for status in client.status()) == min(num_kept, len(addresses)), client.status()
    print(json.dumps([ready_s, time.perf_counter() - begin]), flush=True)
    await _read_line()
    times: list[float] = []
    new: list[float] = []
    for number in range(num_pictures):
        item = image(png(_SIDE, _SIDE, 1_000_000 * seed + number))
        connected = sum(status.ready for status in client.status())
        begin = time.perf_counter()
        async for event in client.encode([item], str(number)):
            if isinstance(event, RowsEvent):
                event.rows.release()
        elapsed = time.perf_counter() - begin
        is_new = sum(status.ready for status in client.status()) > connected
        (new if is_new else times).append(elapsed)
        await asyncio.sleep(_PAUSE_S)
    print(json.dumps([times, new, sum(status.ready for status in client.status())]), flush=True)
    await client.close()


def _files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class _Costs:
    """CPU time, memory and files of some processes, since the last look."""

    def __init__(self, name: str, processes: Sequence[LineProcess], num_connections: int) -> None:
        self._name, self._pids, self._number = name, [process.pid for process in processes], num_connections
        self._last = self._now()

    def _now(self) -> tuple[float, float, float]:
        pids = self._pids
        return sum(map(cpu_seconds, pids)), sum(map(resident_mib, pids)), sum(map(_files, pids))

    def connected(self) -> None:
        cpu, memory, files = (now - last for now, last in zip(self._now(), self._last, strict=True))
        number = self._number
        print(
            f"  {self._name}: {1e3 * cpu / number:.1f} ms of CPU time, {1024 * memory / number:.0f} KiB and "
            f"{files / number:.2f} files a connection"
        )
        self._last = self._now()

    def idle(self, seconds: float) -> None:
        cpu = self._now()[0] - self._last[0]
        print(f"  {self._name} idle: {1e6 * cpu / seconds / self._number:.0f} us of CPU time a second and connection")
        self._last = self._now()


async def measure(
    servers: Sequence[LineProcess],
    addresses: list[str],
    shm_folder: Path,
    *,
    num_kept: int,
    num_workers: int,
    num_pictures: int,
) -> None:
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                LineProcess.started("benchmarks.connections", "--role", "work", "--shm-folder", str(shm_folder))
            )
            for _ in range(num_workers)
        ]
        for worker in workers:
            await worker.read_line()
        number = num_workers * min(num_kept, len(addresses))
        print(f"{num_workers} workers keep {min(num_kept, len(addresses))} of {len(addresses)} encoders connected")
        sides = [_Costs("workers", workers, number), _Costs("encoders", servers, number)]
        for seed, worker in enumerate(workers):
            await worker.send_line(json.dumps([addresses, num_kept, seed, num_pictures]))
        for worker in workers:
            ready_s, all_s = json.loads(await worker.read_line())
            print(f"  ready after {ready_s:.3f} s, all of these connected after {all_s:.2f} s")
        for side in sides:
            side.connected()
        await asyncio.sleep(_IDLE_S)
        for side in sides:
            side.idle(_IDLE_S)
        for worker in workers:
            await worker.send_line("")
            times, new, num_connected = json.loads(await worker.read_line())
            for name, each in (("connected already", sorted(times)), ("connected for it", sorted(new))):
                if each:
                    p50, p90 = (1e3 * each[int(part * len(each))] for part in (0.5, 0.9))
                    print(f"  a picture, encoder {name}: {len(each)}, p50 {p50:.1f} ms, p90 {p90:.1f} ms")
            print(f"  {num_connected} encoders connected after {num_pictures} pictures")


async def main(num_encoders: int, num_workers: int, num_pictures: int, kept: Sequence[int]) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shm_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        save_random_checkpoint(folder, "qwen3_vl")
        servers = []
        for number in range(_NUM_SERVERS):
            share = num_encoders // _NUM_SERVERS + (number < num_encoders % _NUM_SERVERS)
            options = ["--role", "serve", "--encoders", str(share), "--folder", str(folder)]
            start = LineProcess.started("benchmarks.connections", *options, "--shm-folder", str(shm_folder))
            servers.append(await stack.enter_async_context(start))
        addresses: list[str] = []
        for server in servers:
            addresses += json.loads(await server.read_line())
        for num_kept in kept:
            await measure(
                servers,
                addresses,
                shm_folder,
                num_kept=num_kept,
                num_workers=num_workers,
                num_pictures=num_pictures,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--encoders", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=300, help="that a worker sends")
    parser.add_argument("--kept", type=int, nargs="+", default=[200, 32], help="connections that a worker keeps")
    parser.add_argument("--role", choices=["main", "serve", "work"], default="main", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shm-folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "serve":
        asyncio.run(serve(arguments.encoders, arguments.folder, arguments.shm_folder))
    elif arguments.role == "work":
        asyncio.run(work(arguments.shm_folder))
    else:
        asyncio.run(main(arguments.encoders, arguments.workers, arguments.pictures, arguments.kept))
