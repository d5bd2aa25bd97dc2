"""What the services of a soak use: memory, threads and files of the processes, and what their metrics report."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.soak.services import Service

# Gauges that are 0 in a service without requests; those of a prefix that a service does not have are not looked for.
IDLE_GAUGES = (
    "vitrine_encoder_leases_live",
    "vitrine_encoder_pool_used_bytes",
    "vitrine_llm_running",
    "vitrine_llm_waiting",
    "vitrine_llm_queued_prefill_tokens",
    "vitrine_llm_kv_blocks_used",
    "vitrine_gateway_server_in_flight",
)
_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """One process at one time. at: seconds of `time.monotonic`. start: which start of the service, from 1 on."""

    at: float
    service: str
    start: int
    rss_nbytes: int
    num_threads: int
    num_files: int


def sample(service: Service) -> Sample | None:
    """Returns None while the process is not running."""
    folder = Path(f"/proc/{service.pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        num_threads = len(list((folder / "task").iterdir()))
        num_files = len(list((folder / "fd").iterdir()))
    except OSError:
        return None
    return Sample(time.monotonic(), service.name, service.num_starts, pages * _PAGE_NBYTES, num_threads, num_files)


def samples_by_name(services: Sequence[Service]) -> dict[str, Sample]:
    """Samples all services that run."""
    return {service.name: found for service in services if (found := sample(service)) is not None}


async def keep_sampling(services: Sequence[Service], every_s: float, samples: list[Sample]) -> None:
    """Samples all services, for ever."""
    while True:
        samples.extend(found for service in services if (found := sample(service)) is not None)
        await asyncio.sleep(every_s)


async def busy_gauges(services: Sequence[Service]) -> dict[str, float]:
    """Returns the gauges of IDLE_GAUGES that are not 0, by service and name."""
    busy: dict[str, float] = {}
    async with aiohttp.ClientSession() as session:
        for service in services:
            async with session.get(service.metrics_url) as response:
                lines = (await response.text()).splitlines()
            for line in lines:
                name, _, value = line.rpartition(" ")
                if name.partition("{")[0] in IDLE_GAUGES and float(value) != 0:
                    busy[f"{service.name} {name}"] = float(value)
    return busy


async def wait_idle(services: Sequence[Service], timeout_s: float) -> dict[str, float]:
    """Waits until all gauges are 0; returns those that are not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        busy = await busy_gauges(services)
        if not busy or time.monotonic() > deadline:
            return busy
        await asyncio.sleep(0.5)
