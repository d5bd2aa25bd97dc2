"""One load on one server: pictures are drawn, requests of its kind warm the server up, then it is measured."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.chat_load import ChatClient, Load, run_load
from benchmarks.compare.drawn_pictures import pictures_of
from benchmarks.compare.workloads import FULL_HD, TEXT_TOKENS, Workload, warm_up
from benchmarks.vision_interference import InterferenceResult, VisionInterference

_SETTLE_S = 1.0  # until the interfering pictures have filled every stage


@dataclass(frozen=True)
class Target:
    """A server that takes requests.

    name: what its pictures are drawn for.
    interference: draws pictures for loads that have some beside; None if no load has.
    cpu_s, energy_j: counters that grow, of the server's CPU time and the GPU's energy; None where they are not known.
    """

    name: str
    url: str
    client: ChatClient
    interference: VisionInterference | None = None
    cpu_s: Callable[[], float | None] = lambda: None
    energy_j: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class TimeLimits:
    """Seconds behind which a load, and what warms up for it, send no more requests. Those in flight are waited for."""

    warm_up_s: float = float("inf")
    load_s: float = float("inf")


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    cpu_s, energy_j: of the load, its pictures beside included; None where they are not known.
    beside: how the pictures beside did, if there were any.
    """

    load: Load
    cpu_s: float | None
    energy_j: float | None
    beside: InterferenceResult | None


@asynccontextmanager
async def interference_for(workloads: Iterable[Workload], seed: int) -> AsyncIterator[VisionInterference | None]:
    """Starts what sends pictures beside loads, which begins to draw; None if no load has pictures beside."""
    in_flight = max((each.beside for each in workloads), default=0)
    if not in_flight:
        yield None
        return
    async with VisionInterference.started(FULL_HD, in_flight, TEXT_TOKENS, seed) as interference:
        yield interference


async def measure(workload: Workload, target: Target, limits: TimeLimits) -> Measurement:
    """Measures a load."""
    first = warm_up(workload)
    warm_up_bodies = await _bodies(first, target, "warm-up")
    bodies = await _bodies(workload, target, "measured")
    await run_load(target.client, _until(limits.warm_up_s, warm_up_bodies), first.in_flight)
    beside = target.interference if workload.beside else None
    if beside:
        await beside.start(target.url)
        await asyncio.sleep(_SETTLE_S)
    cpu_s, energy_j = target.cpu_s(), target.energy_j()
    load = await run_load(target.client, _until(limits.load_s, bodies), workload.in_flight)
    cpu_s, energy_j = _grown(cpu_s, target.cpu_s()), _grown(energy_j, target.energy_j())
    return Measurement(load, cpu_s, energy_j, await beside.stop() if beside else None)


async def _bodies(workload: Workload, target: Target, purpose: str) -> list[bytes]:
    pictures = await asyncio.to_thread(pictures_of, workload, f"{target.name}/{purpose}")
    return [target.client.body(workload.text_tokens, workload.max_tokens, *jpegs) for jpegs in pictures]


def _until(limit_s: float, bodies: list[bytes]) -> Iterable[bytes]:
    """Yields bodies until `limit_s` seconds after the first."""
    start = time.perf_counter()
    return itertools.takewhile(lambda _: time.perf_counter() - start < limit_s, bodies)


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
