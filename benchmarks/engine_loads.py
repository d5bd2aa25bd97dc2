"""The same loads on several OpenAI servers in turns: `python -m benchmarks.engine_loads --server NAME=URL ...`.

It compares engines with each other, or an engine with and without encoders of its own. All servers run on the same
GPU; one is measured at a time, load by load. No picture is sent twice, not even to different servers, because they may
share encoders. Pictures are drawn before the servers need to be ready. Figures go to stdout as a Markdown table, and as
JSON lines to --output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.chat_load import ChatClient, Load, run_load
from benchmarks.cpu_time import cpu_seconds
from benchmarks.pictures import random_jpegs
from benchmarks.vision_interference import VisionInterference
from vitrine_vlm.deploy.launcher.ask import AskFailed

_SETTLE_S = 1.0  # until the interfering pictures have filled every stage
_TEXT_TOKENS = 128
_READY_POLL_S = 0.5


@dataclass(frozen=True)
class Kind:
    """A load: `num_requests` requests, `in_flight` at a time, each with `num_pictures` pictures of `size` and text.

    beside: 1080p pictures that are kept in flight meanwhile, one token of answer each.
    """

    name: str
    num_requests: int
    in_flight: int
    max_tokens: int
    size: tuple[int, int] = (560, 560)
    num_pictures: int = 1
    text_tokens: int = _TEXT_TOKENS
    beside: int = 0


_HD, _FULL_HD = (1280, 720), (1920, 1080)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("560x560, 32 in flight, 1 token", 192, 32, 1),
        Kind("560x560, 32, 64 tokens", 128, 32, 64),
        Kind("720p, 32, 64 tokens", 96, 32, 64, _HD),
        Kind("1080p, 8, 64 tokens", 48, 8, 64, _FULL_HD),
        Kind("1080p, 32, 64 tokens", 64, 32, 64, _FULL_HD),
        Kind("4 x 560x560, 16, 64 tokens", 48, 16, 64, num_pictures=4),
        Kind("560x560, one at a time", 12, 1, 1),
        Kind("1080p, one at a time", 12, 1, 1, _FULL_HD),
        Kind("16 streams of 256 tokens beside 8 x 1080p", 16, 16, 256, num_pictures=0, beside=8),
        Kind("text only, 512 in, 128 out, 32", 96, 32, 128, num_pictures=0, text_tokens=512),
    )
}
_SMALL = Kind("small", 4, 2, 4, (96, 64))


@dataclass(frozen=True)
class Server:
    """A server under test. pid: the process whose CPU time is measured, with its descendants; None for none."""

    name: str
    url: str
    pid: int | None


class _Pictures:
    """Draws all pictures, each server's own."""

    def __init__(self, kinds: Sequence[Kind], servers: Sequence[Server]) -> None:
        self._drawn: dict[tuple[str, str], list[bytes]] = {}
        for kind in kinds:
            each = kind.num_requests * kind.num_pictures
            jpegs = random_jpegs(each * len(servers), kind.size, seed=len(self._drawn)) if each else []
            for index, server in enumerate(servers):
                self._drawn[kind.name, server.name] = jpegs[index * each : (index + 1) * each]

    def of(self, kind: Kind, server: Server) -> list[tuple[bytes, ...]]:
        """Returns the pictures of each request."""
        jpegs = self._drawn[kind.name, server.name]
        requests = range(kind.num_requests)
        return [tuple(jpegs[each * kind.num_pictures : (each + 1) * kind.num_pictures]) for each in requests]


async def measure(servers: Sequence[Server], kinds: Sequence[Kind], ready_timeout_s: float) -> list[dict[str, Any]]:
    """Measures every load on every server; returns a record of figures for each.

    Raises:
        TimeoutError: a server is not ready in time.
        AskFailed: a server cannot answer plain text.
    """
    pictures, _ = await asyncio.gather(
        asyncio.to_thread(_Pictures, kinds, servers),
        asyncio.gather(*(_wait_ready(server, ready_timeout_s) for server in servers)),
    )
    records = []
    async with AsyncExitStack() as stack:
        clients = {each.name: await stack.enter_async_context(ChatClient.connected(each.url)) for each in servers}
        interference = {}
        beside = max(kind.beside for kind in kinds)
        for index, server in enumerate(servers if beside else ()):
            starting = VisionInterference.started(_FULL_HD, beside, _TEXT_TOKENS, seed=1000 + index)
            interference[server.name] = await stack.enter_async_context(starting)
        for each in interference.values():
            await each.wait_ready()
        for kind in kinds:
            for server in servers:
                record = await _measure_one(kind, server, clients[server.name], pictures, interference)
                print(json.dumps(record), file=sys.stderr, flush=True)
                records.append(record)
    return records


async def _measure_one(
    kind: Kind,
    server: Server,
    client: ChatClient,
    pictures: _Pictures,
    interference: Mapping[str, VisionInterference],
) -> dict[str, Any]:
    bodies = [client.body(kind.text_tokens, kind.max_tokens, *jpegs) for jpegs in pictures.of(kind, server)]
    record: dict[str, Any] = {"load": kind.name, "server": server.name}
    if kind.beside:
        await interference[server.name].start(server.url)
        await asyncio.sleep(_SETTLE_S)
    cpu_before = cpu_seconds(server.pid) if server.pid else 0.0
    load = await run_load(client, bodies, kind.in_flight)
    cpu_after = cpu_seconds(server.pid) if server.pid else 0.0
    if kind.beside:
        beside = await interference[server.name].stop()
        record["pictures_per_s"] = beside.requests_per_s
        record["beside_failures"] = beside.failures[:3]
    if server.pid:
        record["cpu_s_per_request"] = (cpu_after - cpu_before) / max(1, len(load.answers))
    return record | _figures(load)


def _figures(load: Load) -> dict[str, Any]:
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


async def _wait_ready(server: Server, timeout_s: float) -> None:
    """Waits until the server lists its models.

    Raises:
        TimeoutError: it does not in time.
    """
    start = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() - start < timeout_s:
            try:
                async with session.get(f"{server.url}/v1/models") as response:
                    if response.status == 200:
                        print(
                            f"{server.name}: ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
                        )
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_READY_POLL_S)
    raise TimeoutError(f"{server.name} at {server.url} is not ready after {timeout_s:g} s")


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
    parser.add_argument("--loads", type=int, nargs="*", help="which, by number; default all: " + "; ".join(KINDS))
    parser.add_argument("--small", action="store_true", help="one small load, for any machine")
    parser.add_argument("--ready-timeout-s", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON lines")
    options = parser.parse_args(arguments)
    kinds = [_SMALL] if options.small else list(KINDS.values())
    if options.loads:
        kinds = [kinds[number] for number in options.loads]
    try:
        records = asyncio.run(measure(options.server, kinds, options.ready_timeout_s))
    except (AskFailed, aiohttp.ClientError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.output:
        options.output.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    print(table(records))
    return 1 if any(each["num_failures"] for each in records) else 0


if __name__ == "__main__":
    sys.exit(main())
