"""What shipping rows costs: throughput and CPU time of each transport between two processes on this host.

Each figure covers one item from the encode call to its rows lying in the worker's input buffers: export into the pool
or chunks, the way over, and the landing copy. Run `python -m benchmarks.transports`; it prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from embedding_transport.encoder_client import EncoderClient
from embedding_transport.encoder_rpc import encoder_handlers
from embedding_transport.exporter import RowExporter
from embedding_transport.row_peer import TransportChoice
from embedding_transport.row_source import TensorSource
from embedding_transport.session_rpc import SessionServicer
from embedding_transport.shm_pool import ShmPool
from embedding_transport.types import DTYPES, ItemTimings, MediaItem, ModelIdentity, RowsEvent
from embedding_transport.wire import describe
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from service_runtime.grpc_channel import CHANNEL_OPTIONS
from service_runtime.memory import reuse_message_memory

MIB = 1024 * 1024
SIZES_MIB = (1, 10, 64)
CHUNKS_KIB = (256, 1024, 2048, 4096)
# Rows of Qwen3-VL-8B: 32 KiB each.
IDENTITY = ModelIdentity("benchmark", "1", "qwen3_vl", 4096, (8, 16, 24), "bfloat16")
_WARM_UPS = 3
_REPEATS = {1: 60, 10: 25, 64: 10}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats; CPU seconds are of all repeats together, per GB (10^9 bytes) shipped."""

    gb_per_s: float
    spread_gb_per_s: tuple[float, float]
    client_cpu_s_per_gb: float
    server_cpu_s_per_gb: float


class RowServer(SessionServicer, encoder_pb2_grpc.EncoderServicer):  # type: ignore[misc]
    """An encoder without a tower: the item's data is the number of rows wanted."""

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
    exporter.start()
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((encoder_handlers(RowServer(exporter)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextlib.asynccontextmanager
async def running_server(shm_folder: Path, chunk_nbytes: int) -> AsyncIterator[tuple[str, int]]:
    """Address and process id."""
    command = [sys.executable, "-m", "benchmarks.transports", "--serve", str(shm_folder), str(chunk_nbytes)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip(), process.pid
    finally:
        process.kill()
        await process.wait()


async def measure(client: EncoderClient, server_pid: int, size_mib: int) -> Cost:
    num_tokens = size_mib * MIB // IDENTITY.row_nbytes
    item = MediaItem("image", data=str(num_tokens).encode())
    main_TD = torch.zeros(num_tokens, IDENTITY.out_hidden_size, dtype=DTYPES[IDENTITY.dtype])
    deepstack_NTD = torch.zeros(3, *main_TD.shape, dtype=main_TD.dtype)
    nbytes = num_tokens * IDENTITY.row_nbytes

    async def ship() -> float:
        start = time.perf_counter()
        async for event in client.encode([item], "benchmark"):
            if isinstance(event, RowsEvent):
                event.rows.copy_to(main_TD, deepstack_NTD, 0)
                event.rows.check()
                event.rows.release()
        return time.perf_counter() - start

    for _ in range(_WARM_UPS):
        await ship()
    own_cpu_s, server_cpu_s = _own_cpu_s(), _cpu_s(server_pid)
    rates = sorted([nbytes / await ship() / 1e9 for _ in range(_REPEATS[size_mib])])
    shipped_gb = nbytes * len(rates) / 1e9
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


def _size(kib: int) -> str:
    return f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_s(pid: int) -> float:
    """User and system time of a process, seconds (fields 14 and 15 of /proc/<pid>/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("SHM_FOLDER", "CHUNK_NBYTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    reuse_message_memory()  # as the services do
    if options.serve:
        asyncio.run(serve(Path(options.serve[0]), int(options.serve[1])))
    else:
        torch.set_num_threads(1)
        asyncio.run(measure_all())


if __name__ == "__main__":
    main()
