"""A comparison: servers are started one after the other on the same GPU, measured with all loads, and ended."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.chat_load import ChatClient
from benchmarks.compare.gpu import Gpu
from benchmarks.compare.measuring import Target, TimeLimits, interference_for, measure
from benchmarks.compare.records import Failure, Record, failure_record, load_record, now, start_record
from benchmarks.compare.running_server import RunningServer, version_of
from benchmarks.compare.server_file import ServerSpec, free_ports
from benchmarks.compare.workloads import Workload

_FREED_TIMEOUT_S, _FREED_POLL_S = 60.0, 0.5
_FREED_SLACK_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Run:
    """How servers are measured.

    specs: with placeholders, which `values` fill in, besides ports.
    output: file that records are appended to as soon as they are there.
    facts: `machine`, `environment` and `command_line`, for the records.
    done: servers and loads that are left out, because they were measured before.
    end_s: `time.monotonic` from which on no load is begun.
    """

    specs: Sequence[ServerSpec]
    workloads: Sequence[Workload]
    limits: TimeLimits
    values: Mapping[str, str]
    output: Path
    logs: Path
    gpu: Gpu | None
    facts: Record
    done: frozenset[tuple[str, str]] = field(default_factory=frozenset)
    end_s: float = float("inf")

    async def measure_all(self) -> bool:
        """Measures all that is not done; returns whether everything was measured.

        A server that fails is recorded as failed, and the next one is measured.
        """
        complete = True
        for index, spec in enumerate(self.specs):
            left = [each for each in self.workloads if (spec.name, each.name) not in self.done]
            if not left:
                _log(f"{spec.name}: all loads were measured before")
            elif time.monotonic() >= self.end_s:
                _log(f"{spec.name}: no time left for {len(left)} loads")
                complete = False
            else:
                complete &= await self._measure_server(index, spec, left)
        return complete

    async def _measure_server(self, index: int, spec: ServerSpec, workloads: Sequence[Workload]) -> bool:
        ports = free_ports(sorted(spec.port_names()))
        filled = spec.filled({**self.values, **ports})
        version = await version_of(filled)
        used_bytes = self.gpu.memory_used_bytes() if self.gpu else 0
        _log(f"{spec.name}: starting, logs in {self.logs}")
        async with (
            interference_for(workloads, seed=1000 + index) as interference,
            RunningServer.started(filled, ports["port"], self.logs) as server,
        ):
            during, complete = "start", False
            try:
                await server.wait_ready()
                _log(f"{spec.name}: ready after {server.start_s:.0f} s")
                self._append(start_record(filled, server, version, self.facts))
                if interference:
                    await interference.wait_ready()
                async with ChatClient.connected(server.url) as client:
                    target = Target(spec.name, server.url, client, interference, lambda: server.cpu_s, self._energy_j)
                    for num_done, workload in enumerate(workloads):
                        if time.monotonic() >= self.end_s:
                            _log(f"{spec.name}: no time left for {len(workloads) - num_done} loads")
                            break
                        during = workload.name
                        await self._measure_load(workload, server, target)
                    else:
                        complete = True
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:  # also of what sends pictures beside
                failure = server.failure(error)
                _log(f"{spec.name} failed during {during}: {failure}")
                self._append(failure_record(Failure(spec.name, now(), during, failure.message, failure.log_tail)))
        await self._wait_freed(spec.name, used_bytes)
        return complete

    async def _measure_load(self, workload: Workload, server: RunningServer, target: Target) -> None:
        begin = time.monotonic()
        measured = await server.unless_failed(measure(workload, target, self.limits))
        self._append(load_record(target.name, workload, measured))
        load = measured.load
        failures = f", {len(load.failures)} failures: {load.failures[0]}" if load.failures else ""
        took = f"{time.monotonic() - begin:.0f} s with warm-up"
        _log(f"{target.name}: {workload.name}: {load.requests_per_s:.2f} requests/s, {took}{failures}")

    def _energy_j(self) -> float | None:
        return self.gpu.energy_j() if self.gpu else None

    async def _wait_freed(self, name: str, used_bytes: int) -> None:
        """Waits until the GPU's memory is as free as before the server was started."""
        if self.gpu is None:
            return
        deadline = time.monotonic() + _FREED_TIMEOUT_S
        while (left := self.gpu.memory_used_bytes() - used_bytes) > _FREED_SLACK_BYTES:
            if time.monotonic() > deadline:
                _log(
                    f"{name} was ended {_FREED_TIMEOUT_S:g} s ago, but {left / 1024**3:.1f} GiB of the GPU are not free"
                )
                return
            await asyncio.sleep(_FREED_POLL_S)

    def _append(self, record: Record) -> None:
        with self.output.open("a") as file:
            file.write(f"{json.dumps(record)}\n")


def _log(message: str) -> None:
    print(f"[compare] {message}", file=sys.stderr, flush=True)
