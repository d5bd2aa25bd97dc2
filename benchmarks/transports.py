"""Measures the cost of shipping rows: throughput and CPU time of each transport between two processes on this host.

Each figure covers one item from the encode call until its rows are in the worker's input buffers: export to the pool or
to chunks, the transfer, and the landing copy. `python -m benchmarks.transports` prints two Markdown tables: one item at
a time, and several connections at once, each kept busy by its own worker process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from benchmarks.line_process import LineProcess
from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import encoder_handlers
from vitrine_vlm.embedding_transport.shipping.exporter import CHUNK_NBYTES, RowExporter
from vitrine_vlm.embedding_transport.shipping.session_rpc import SessionServicer
from vitrine_vlm.embedding_transport.wire.messages import describe
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.memory import reuse_message_memory
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ItemTimings, MediaItem, ModelIdentity, RowsEvent

_THIS = "benchmarks.transports"
MIB = 1024 * 1024
SIZES_MIB = (1, 10, 64)
CHUNKS_KIB = (256, 1024, 2048, 4096)
# Rows of Qwen3-VL-8B: 32 KiB each.
IDENTITY = ModelIdentity("benchmark", "1", "qwen3_vl", 4096, (8, 16, 24), "bfloat16")
# Encoder processes, worker processes, items in flight in each worker. Worker i calls encoder i modulo their number.
CONNECTIONS = ((1, 1, 1), (1, 1, 4), (1, 4, 1), (4, 4, 1))
_CONNECTIONS_SIZE_MIB, _CONNECTIONS_S = 10, 5.0
_WARM_UPS = 3
_REPEATS = {1: 60, 10: 25, 64: 10}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats; CPU seconds of all repeats together, per GB (10^9 bytes) shipped."""

    gb_per_s: float
    spread_gb_per_s: tuple[float, float]
    client_cpu_s_per_gb: float
    server_cpu_s_per_gb: float


class RowServer(SessionServicer, encoder_pb2_grpc.EncoderServicer):  # type: ignore[misc]
    """An encoder without a tower: the item's data is the number of rows to ship."""

    def __init__(self, exporter: RowExporter) -> None:
        self._rows_exporter = exporter
        self._rows_TW = torch.randn(SIZES_MIB[-1] * MIB // IDENTITY.row_nbytes, IDENTITY.row_width).to(
            DTYPES[IDENTITY.dtype]
        )

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        return describe(
            IDENTITY,
            processor=encoder_pb2.ProcessorSettings(merge_size=2),
        )

    async def Encode(self, request, context):  # type: ignore[no-untyped-def, override]
        num_tokens = int(request.items[0].data)
        layout = encoder_pb2.Layout(grid_thw=[1, 2, 2 * num_tokens], num_tokens=num_tokens)
        await context.write(encoder_pb2.EncodeResponse(layout=layout))
        rows = TensorSource(self._rows_TW[:num_tokens])
        async for response in self._rows_exporter.export(request.session_id, 0, rows, ItemTimings()):
            await context.write(response)

    async def GetStats(self, request, context):  # type: ignore[no-untyped-def]
        return encoder_pb2.GetStatsResponse()

    def _exporter(self) -> RowExporter:
        return self._rows_exporter


async def serve(shm_folder: Path, chunk_nbytes: int) -> None:
    """Runs the server until killed; prints its address."""
    pool = ShmPool(shm_folder, 4 * SIZES_MIB[-1] * MIB)
    exporter = RowExporter([pool], lease_ttl_s=60, chunk_nbytes=chunk_nbytes)
    exporter.start(Supervisor())
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((encoder_handlers(RowServer(exporter)),))  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextlib.asynccontextmanager
async def running_server(shm_folder: Path, chunk_nbytes: int) -> AsyncIterator[tuple[str, int]]:
    """Runs a server; yields its address and process id."""
    async with LineProcess.started(_THIS, "--serve", str(shm_folder), str(chunk_nbytes)) as process:
        yield await process.read_line(), process.pid


class Worker:
    """Requests items of one size and lands them in its own buffers."""

    def __init__(self, client: EncoderClient, size_mib: int) -> None:
        num_tokens = size_mib * MIB // IDENTITY.row_nbytes
        self.nbytes = num_tokens * IDENTITY.row_nbytes
        self._client = client
        self._item = MediaItem("image", data=str(num_tokens).encode())
        self._main_TD = torch.zeros(num_tokens, IDENTITY.out_hidden_size, dtype=DTYPES[IDENTITY.dtype])
        self._deepstack_NTD = torch.zeros(3, *self._main_TD.shape, dtype=self._main_TD.dtype)

    async def ship(self) -> float:
        """Ships one item; returns the seconds that it took."""
        start = time.perf_counter()
        async for event in self._client.encode([self._item], "benchmark"):
            if isinstance(event, RowsEvent):
                event.rows.copy_to(self._main_TD, self._deepstack_NTD, 0)
                event.rows.check()
                event.rows.release()
        return time.perf_counter() - start


async def measure(client: EncoderClient, server_pid: int, size_mib: int) -> Cost:
    worker = Worker(client, size_mib)
    for _ in range(_WARM_UPS):
        await worker.ship()
    own_cpu_s, server_cpu_s = _own_cpu_s(), _cpu_s(server_pid)
    rates = sorted([worker.nbytes / await worker.ship() / 1e9 for _ in range(_REPEATS[size_mib])])
    shipped_gb = worker.nbytes * len(rates) / 1e9
    return Cost(
        statistics.median(rates),
        (rates[len(rates) // 10], rates[-1 - len(rates) // 10]),
        (_own_cpu_s() - own_cpu_s) / shipped_gb,
        (_cpu_s(server_pid) - server_cpu_s) / shipped_gb,
    )


async def measure_all() -> None:
    print("| transport | size | GB/s, median (10th-90th percentile) | CPU s/GB, worker | CPU s/GB, encoder |")
    print("|---|---|---|---|---|")
    configurations: list[tuple[str, TransportChoice, int]] = [("shm", "shm", MIB)]
    configurations += [(f"grpc, {_size(kib)} chunks", "grpc", kib * 1024) for kib in CHUNKS_KIB]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, transport, chunk_nbytes in configurations:
            async with running_server(Path(folder), chunk_nbytes) as (address, pid):
                client = EncoderClient([address], IDENTITY, transport=transport, shm_folder=Path(folder))
                await client.start()
                for size_mib in SIZES_MIB:
                    cost = await measure(client, pid, size_mib)
                    low, high = cost.spread_gb_per_s
                    print(
                        f"| {name} | {size_mib} MiB | {cost.gb_per_s:.2f} ({low:.2f}-{high:.2f}) "
                        f"| {cost.client_cpu_s_per_gb:.2f} | {cost.server_cpu_s_per_gb:.2f} |",
                        flush=True,
                    )
                await client.close()
    print(f"\n| encoders | workers | in flight in each | grpc, {_CONNECTIONS_SIZE_MIB} MiB, GB/s of all |")
    print("|---|---|---|---|")
    for num_encoders, num_workers, num_in_flight in CONNECTIONS:
        gb_per_s = await measure_together(num_encoders, num_workers, num_in_flight)
        print(f"| {num_encoders} | {num_workers} | {num_in_flight} | {gb_per_s:.2f} |", flush=True)


async def work(address: str, num_in_flight: int) -> None:
    """Runs a worker process: prints "warm", begins when it reads a line on stdin, prints the bytes per second."""
    client = EncoderClient([address], IDENTITY, transport="grpc")
    await client.start()
    workers = [Worker(client, _CONNECTIONS_SIZE_MIB) for _ in range(num_in_flight)]
    for worker in workers:
        for _ in range(_WARM_UPS):
            await worker.ship()
    print("warm", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    start = time.perf_counter()

    async def keep_asking(worker: Worker) -> int:
        nbytes = 0
        while time.perf_counter() < start + _CONNECTIONS_S:
            await worker.ship()
            nbytes += worker.nbytes
        return nbytes

    shipped_nbytes = sum(await asyncio.gather(*map(keep_asking, workers)))
    print(shipped_nbytes / (time.perf_counter() - start), flush=True)
    await client.close()


async def measure_together(num_encoders: int, num_workers: int, num_in_flight: int) -> float:
    """Returns the GB/s of all connections together, while all are busy."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        servers = [await stack.enter_async_context(running_server(folder, CHUNK_NBYTES)) for _ in range(num_encoders)]
        asking = [
            await stack.enter_async_context(
                LineProcess.started(_THIS, "--work", servers[index % num_encoders][0], str(num_in_flight))
            )
            for index in range(num_workers)
        ]
        for worker in asking:
            await worker.read_line()
        for worker in asking:
            await worker.send_line("")
        rates = await asyncio.gather(*(worker.read_line() for worker in asking))
    return sum(map(float, rates)) / 1e9


def _size(kib: int) -> str:
    return f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_s(pid: int) -> float:
    """Returns the user and system time of a process in seconds (fields 14 and 15 of /proc/<pid>/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("SHM_FOLDER", "CHUNK_NBYTES"), help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, metavar=("ADDRESS", "NUM_IN_FLIGHT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reuse_message_memory()  # as the services do
    if options.serve:
        asyncio.run(serve(Path(options.serve[0]), int(options.serve[1])))
    elif options.work:
        asyncio.run(work(options.work[0], int(options.work[1])))
    else:
        asyncio.run(measure_all())


if __name__ == "__main__":
    main()
