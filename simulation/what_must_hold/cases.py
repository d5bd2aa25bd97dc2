"""The cases of docs/scale.md that are run request by request, at any size."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, cast

from vitrine_vlm.simulation.fleet import Fault, Fleet
from vitrine_vlm.simulation.scenario import Scenario, Traffic
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.what_must_hold.case import NONE_REFUSED, NOTHING_LOST, Case, Goal, Result, in_time
from vitrine_vlm.simulation.what_must_hold.pods import OwnClock, Pods
from vitrine_vlm.simulation.workload import Pictures, Rate, SimulatedRequest, arrivals, burst, steady, users

# Screens and photographs as agents and phones send them; a tower does so many of them a second.
_SIZES: dict[tuple[int, int], float] = {(720, 1280): 4, (1080, 1920): 6}
_TOWER_RATE = 44.0


@dataclass(frozen=True)
class Rollout:
    """A rolling upgrade. seconds: in which requests come; start_s: until a new pod serves."""

    num_encoders: int
    num_workers: int
    seconds: float
    start_s: float


@dataclass(frozen=True)
class Size:
    """How large a run is. seconds: in which requests come."""

    num_encoders: int
    seconds: float
    rollout: Rollout
    seed: int = 0


FULL = Size(num_encoders=30, seconds=8.0, rollout=Rollout(1000, 45, seconds=120.0, start_s=50.0))
SHORT = Size(num_encoders=9, seconds=2.0, rollout=Rollout(12, 13, seconds=2.0, start_s=0.4))


def cases(size: Size) -> list[Case]:
    """All of them, each of about the same number of requests a second and encoder."""
    half = _Load(size, utilization=0.5)
    number, third = size.num_encoders, tuple(range(0, size.num_encoders, 3))
    begin, end = 0.3 * size.seconds, 0.4 * size.seconds
    return [
        Case(
            "steady",
            "Nothing happens",
            half.scenario(),
            half.requests(),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.99), _spread(1.5)),
        ),
        Case(
            "viral",
            "30 % of pictures are the same one",
            half.scenario(),
            half.requests(viral=0.3),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.99), _spread(1.5), _cache(0.02), _p99(1.1)),
        ),
        Case(
            "zone_loss",
            "A third of encoders is killed in one moment",
            half.scenario(Fault("kill", begin, third)),
            half.requests(),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.98), _retries(0.1)),
            since=begin,
        ),
        _rollout(size),
        _burst(size, begin, end),
        Case(
            "late_discovery",
            "Discovery is late: pods end and others start meanwhile",
            half.scenario(),
            half.requests(),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.98), _retries(0.1)),
            begin=lambda fleet: _start(_exchange(fleet, size, number // 4)),
            since=begin,
        ),
        Case(
            "slow",
            "One encoder's tower is ten times slower",
            half.scenario(Fault("slow", begin, (1,), size.seconds)),
            half.requests(),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.99), _p99(1.5)),
            since=begin,
        ),
        Case(
            "clocks",
            "Clocks of clients and encoders are up to an hour apart",
            half.scenario(),
            half.requests(),
            (NOTHING_LOST, NONE_REFUSED, in_time(0.99), _p99(1.1)),
            begin=lambda fleet: _set_clocks_apart(fleet, size.seed),
        ),
    ]


@dataclass(frozen=True)
class _Load:
    """Requests for a part of what the towers can do, from three workers for two encoders."""

    size: Size
    utilization: float

    @property
    def rate(self) -> float:
        return self.utilization * _TOWER_RATE * self.size.num_encoders

    def scenario(self, *faults: Fault) -> Scenario:
        number = self.size.num_encoders
        return Scenario(number, 3 * number // 2, Traffic(self.rate, self.size.seconds), faults)

    def requests(
        self, *, viral: float = 0.0, repeated: float = 0.0, rate: Rate | None = None, peak: float = 0.0
    ) -> list[SimulatedRequest]:
        rng = random.Random(f"{self.size.seed} traffic")
        moments = arrivals(rng, rate or steady(self.rate), peak or self.rate, self.size.seconds)
        pictures = Pictures(rng, viral=viral, repeated=repeated, sizes=_SIZES)
        return list(users(rng, moments, pictures, (1,), num_generated=1))


def _rollout(size: Size) -> Case:
    """As many requests a second as elsewhere, on more encoders: what is looked at is what the change of pods does."""
    upgrade = size.rollout
    load = _Load(replace(size, seconds=upgrade.seconds), utilization=0.25)
    # The chart leaves the strategy to Kubernetes: 25 % more and 25 % fewer.
    quarter = max(1, upgrade.num_encoders // 4)

    async def roll(fleet: Fleet) -> None:
        pods = Pods(fleet, discovery_s=0.2, start_s=upgrade.start_s, seed=size.seed)
        await pods.roll(quarter, quarter)

    return Case(
        "rollout",
        f"A rolling upgrade of {upgrade.num_encoders} encoders, a quarter more and a quarter fewer at a time",
        replace(load.scenario(), num_encoders=upgrade.num_encoders, num_workers=upgrade.num_workers),
        load.requests(repeated=0.5),
        (NOTHING_LOST, NONE_REFUSED, in_time(0.99), _retries(0.01)),
        begin=lambda fleet: _start(roll(fleet)),
    )


def _burst(size: Size, begin: float, end: float) -> Case:
    load = _Load(size, utilization=0.15)
    rate = burst(load.rate, 10, begin, end)
    return Case(
        "burst",
        f"Ten times the requests for {end - begin:g} s, half as many again as all towers can do",
        load.scenario(),
        load.requests(rate=rate, peak=10 * load.rate),
        (NOTHING_LOST, NONE_REFUSED, _recovers(end, 2 * (end - begin))),
        since=begin,
        until=end,
    )


async def _exchange(fleet: Fleet, size: Size, number: int) -> None:
    """Pods are killed and others serve at once; workers learn of both only after 30 s, or after all requests."""
    await asyncio.sleep(0.3 * size.seconds)
    pods = Pods(fleet, discovery_s=30.0, seed=size.seed)
    pods.kill(list(fleet.encoders)[:number])
    for _ in range(number):
        pods.add()


def _set_clocks_apart(fleet: Fleet, seed: int) -> None:
    """All encoders are replaced, before the first request, by ones whose clocks are wrong."""
    rng = random.Random(f"{seed} clocks")
    loop = cast("VirtualLoop", asyncio.get_running_loop())
    pods = Pods(fleet, discovery_s=0.0, seed=seed)
    number = len(fleet.encoders)
    pods.kill(list(fleet.encoders))
    for _ in range(number):
        pods.add(cast("VirtualLoop", OwnClock(loop, rng.uniform(-3600.0, 3600.0))))


_tasks: set[asyncio.Task[None]] = set()


def _start(job: Coroutine[Any, Any, None]) -> None:
    """Runs a job beside the requests."""
    task = asyncio.get_running_loop().create_task(job)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _spread(limit: float) -> Goal:
    return Goal(
        f"the busiest tower has at most {limit:g} times the mean's work",
        lambda result: result.load_spread <= limit,
    )


def _retries(part: float) -> Goal:
    return Goal(f"there is at most one retry for {1 / part:g} requests", lambda result: result.retried_part <= part)


def _cache(part: float) -> Goal:
    def holds(result: Result) -> bool:
        return result.figures.computed_part <= result.figures.distinct_part + part

    return Goal(f"encoders compute at most {100 * part:g} % of items more than one cache for all would", holds)


def _p99(factor: float) -> Goal:
    return Goal(
        f"TTFT p99 is at most {factor:g} times that without it",
        lambda result: result.figures.ttft_s[2] <= factor * result.undisturbed.ttft_s[2],
    )


def _recovers(end: float, within_s: float) -> Goal:
    def holds(result: Result) -> bool:
        later = result.ttft_s(end + within_s)
        goal_s = result.run.scenario.worker_limits.target_ttft_s
        return bool(later) and sum(each <= goal_s for each in later) >= 0.99 * len(later)

    return Goal(f"{within_s:g} s after the burst 99 % of new requests are answered within the goal again", holds)
