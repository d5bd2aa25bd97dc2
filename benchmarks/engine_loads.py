"""The same loads on several OpenAI servers in turns: `python -m benchmarks.engine_loads --server NAME=URL ...`.

It compares servers that run already, on the same GPU; `benchmarks.compare` starts them itself, one after the other. One
is measured at a time, load by load. No picture is sent twice, not even to different servers, because they may share
encoders. Figures go to stdout as a Markdown table, and as JSON lines to --output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.chat_load import ChatClient, Load
from benchmarks.compare.measuring import Measurement, Target, TimeLimits, interference_for, measure
from benchmarks.compare.workloads import SMALL, TEN, Workload
from benchmarks.process_tree import cpu_seconds
from vitrine_vlm.deploy.launcher.ask import AskFailed

_READY_POLL_S = 0.5


@dataclass(frozen=True)
class Server:
    """A server under test. pid: the process whose CPU time is measured, with its descendants; None for none."""

    name: str
    url: str
    pid: int | None

    def cpu_s(self) -> float | None:
        return None if self.pid is None else cpu_seconds(self.pid)


async def measure_all(
    servers: Sequence[Server], workloads: Sequence[Workload], ready_timeout_s: float
) -> list[dict[str, Any]]:
    """Measures every load on every server; returns a record of figures for each.

    Raises:
        TimeoutError: a server is not ready in time.
        AskFailed: a server cannot answer plain text.
    """
    records = []
    async with AsyncExitStack() as stack:
        interference = [
            await stack.enter_async_context(interference_for(workloads, seed=1000 + index))
            for index in range(len(servers))
        ]
        await asyncio.gather(*(wait_ready(server, ready_timeout_s) for server in servers))
        targets = []
        for server, beside in zip(servers, interference, strict=True):
            if beside:
                await beside.wait_ready()
            client = await stack.enter_async_context(ChatClient.connected(server.url))
            targets.append(Target(server.name, server.url, client, beside, server.cpu_s))
        for workload in workloads:
            for target in targets:
                measured = await measure(workload, target, TimeLimits())
                record = {"load": workload.name, "server": target.name} | _figures(measured)
                print(json.dumps(record), file=sys.stderr, flush=True)
                records.append(record)
    return records


def _figures(measured: Measurement) -> dict[str, Any]:
    load = measured.load
    figures: dict[str, Any] = {}
    if measured.beside:
        figures["pictures_per_s"] = measured.beside.requests_per_s
        figures["beside_failures"] = measured.beside.failures[:3]
    if measured.cpu_s is not None:
        figures["cpu_s_per_request"] = measured.cpu_s / max(1, len(load.answers))
    return figures | _figures_of_answers(load)


def _figures_of_answers(load: Load) -> dict[str, Any]:
    figures: dict[str, Any] = {"failures": load.failures[:3], "num_failures": len(load.failures)}
    if not load.answers:
        return figures
    figures |= {"requests_per_s": load.requests_per_s, "ttft_ms": {p: load.ttft_ms(p) for p in (50, 99)}}
    if any(answer.itl_s for answer in load.answers):
        means = [sum(answer.itl_s) / (answer.num_tokens - 1) for answer in load.answers if answer.num_tokens > 1]
        figures |= {
            "itl_ms": {p: load.itl_ms(p) for p in (50, 99)},
            "largest_gap_ms": max(max(answer.itl_s, default=0.0) for answer in load.answers) * 1e3,
            "token_ms": float(np.mean(means)) * 1e3,
        }
    return figures


async def wait_ready(server: Server, timeout_s: float) -> None:
    """Waits until the server lists its models and, if it has /ready as a worker has, is ready: an encoder is connected.

    Raises:
        TimeoutError: it is not in time.
    """
    start = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() - start < timeout_s:
            with suppress(aiohttp.ClientError, TimeoutError):
                statuses = [await _status(session, f"{server.url}{path}") for path in ("/v1/models", "/ready")]
                if statuses in ([200, 200], [200, 404]):
                    seconds = time.monotonic() - start
                    print(f"{server.name}: ready after {seconds:.0f} s", file=sys.stderr, flush=True)
                    return
            await asyncio.sleep(_READY_POLL_S)
    raise TimeoutError(f"{server.name} at {server.url} is not ready after {timeout_s:g} s")


async def _status(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url) as response:
        return response.status


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table: a row per load and server."""
    lines = [
        "| load | server | requests/s | TTFT p50 / p99, ms | ITL p50 / p99 / largest, ms | ms a token "
        "| pictures/s beside | CPU s a request | failures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in records:
        cells = [
            str(each["load"]),
            str(each["server"]),
            _number(each.get("requests_per_s"), 2),
            _pair(each.get("ttft_ms"), 0),
            f"{_pair(each.get('itl_ms'), 1)} / {_number(each.get('largest_gap_ms'), 0)}" if "itl_ms" in each else "",
            _number(each.get("token_ms"), 2),
            _number(each.get("pictures_per_s"), 1),
            _number(each.get("cpu_s_per_request"), 3),
            str(each["num_failures"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else ""


def _pair(value: object, digits: int) -> str:
    return f"{value[50]:.{digits}f} / {value[99]:.{digits}f}" if isinstance(value, dict) else ""


def _server(text: str) -> Server:
    name, _, rest = text.partition("=")
    url, _, pid = rest.partition(",")
    return Server(name, url.rstrip("/"), int(pid) if pid else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server", type=_server, action="append", required=True, help="NAME=URL or NAME=URL,PID (for its CPU time)"
    )
    parser.add_argument(
        "--loads", type=int, nargs="*", help="which, by number; default all: " + "; ".join(each.name for each in TEN)
    )
    parser.add_argument("--small", action="store_true", help="one small load, for any machine")
    parser.add_argument("--ready-timeout-s", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON lines")
    options = parser.parse_args(arguments)
    workloads: tuple[Workload, ...] = SMALL[:1] if options.small else TEN
    if options.loads:
        workloads = tuple(workloads[number] for number in options.loads)
    try:
        records = asyncio.run(measure_all(options.server, workloads, options.ready_timeout_s))
    except (AskFailed, aiohttp.ClientError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.output:
        options.output.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    print(table(records))
    return 1 if any(each["num_failures"] for each in records) else 0


if __name__ == "__main__":
    sys.exit(main())
