"""Scenarios: a fleet, its users and its faults. Those with a name, and any number of small random ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Literal

from vitrine_vlm.simulation.costs import GPUS, MEASURED, Hardware
from vitrine_vlm.simulation.encoder import EncoderLimits
from vitrine_vlm.simulation.fleet import FAULT_KINDS, Fault
from vitrine_vlm.simulation.network import LINKS
from vitrine_vlm.simulation.worker import WorkerLimits
from vitrine_vlm.simulation.workload import (
    Pictures,
    Rate,
    SimulatedRequest,
    agents,
    arrivals,
    burst,
    diurnal,
    steady,
    users,
)


@dataclass(frozen=True)
class Traffic:
    """What users send.

    rate: requests a second on average; pattern: "burst" is ten times as many in a tenth of the time, "agents" begin so
    many turns a second. num_pictures: of a request, one number as likely as another. repeated, viral: see `Pictures`.
    num_generated: tokens of an answer, on average.
    """

    rate: float
    seconds: float
    pattern: Literal["steady", "burst", "diurnal", "agents"] = "steady"
    num_pictures: tuple[int, ...] = (1,)
    repeated: float = 0.0
    viral: float = 0.0
    num_generated: int = 16

    def requests(self, seed: int) -> list[SimulatedRequest]:
        """All requests, in the order of their arrival."""
        rng = random.Random(f"{seed} traffic")
        pictures = Pictures(rng, repeated=self.repeated, viral=self.viral)
        if self.pattern == "agents":
            num_turns = 6
            starts = arrivals(rng, steady(self.rate / num_turns), self.rate / num_turns, self.seconds)
            return agents(rng, starts, pictures, num_turns=num_turns, think_s=2.0, num_generated=self.num_generated)
        rate, peak = self._rate()
        moments = arrivals(rng, rate, peak, self.seconds)
        return list(users(rng, moments, pictures, self.num_pictures, self.num_generated))

    def _rate(self) -> tuple[Rate, float]:
        if self.pattern == "burst":
            begin = 0.3 * self.seconds
            return burst(self.rate, 10, begin, begin + 0.1 * self.seconds), 10 * self.rate
        if self.pattern == "diurnal":
            return diurnal(self.rate, self.seconds), 1.8 * self.rate
        return steady(self.rate), self.rate


@dataclass(frozen=True)
class Scenario:
    """One run, which depends on nothing but this and a seed.

    transport: a name of LINKS. num_zones: encoders are spread over so many, in turns. hardware: of all GPUs.
    """

    num_encoders: int
    num_workers: int
    traffic: Traffic
    faults: tuple[Fault, ...] = ()
    transport: str = "cuda_ipc"
    num_zones: int = 3
    encoder_limits: EncoderLimits = field(default_factory=EncoderLimits)
    worker_limits: WorkerLimits = field(default_factory=WorkerLimits)
    hardware: Hardware = MEASURED


def _zone(number: int, num_encoders: int, num_zones: int = 3) -> tuple[int, ...]:
    return tuple(range(number, num_encoders, num_zones))


# Ten workers of about nine requests a second each, and as many encoders.
_TRAFFIC = Traffic(rate=80, seconds=30)
_FLEET = Scenario(num_encoders=10, num_workers=10, traffic=_TRAFFIC)

SCENARIOS: dict[str, Scenario] = {
    "steady": _FLEET,
    "burst": replace(_FLEET, traffic=replace(_TRAFFIC, pattern="burst")),
    "diurnal": replace(_FLEET, traffic=replace(_TRAFFIC, pattern="diurnal")),
    "agents": replace(_FLEET, traffic=replace(_TRAFFIC, pattern="agents")),
    "viral": replace(_FLEET, traffic=replace(_TRAFFIC, viral=0.3)),
    "repeated": replace(_FLEET, traffic=replace(_TRAFFIC, repeated=0.5)),
    "kill": replace(_FLEET, faults=(Fault("kill", 10, (3,)),)),
    "hang": replace(_FLEET, faults=(Fault("hang", 10, (3,), 15),)),
    "slow": replace(_FLEET, faults=(Fault("slow", 5, (3,), 20),)),
    "zone_loss": replace(_FLEET, faults=(Fault("kill", 10, _zone(0, 10)),)),
    # Five of the ten workers do not reach three encoders for 25 s.
    "partition": replace(_FLEET, faults=(Fault("partition", 5, (0, 1, 2), 25, workers=tuple(range(5))),)),
    "link": replace(_FLEET, faults=(Fault("link", 5, _zone(0, 10), 20, factor=20.0, loss=0.01),)),
    # A rollout that is stopped and undone: three encoders have the new version for 15 s each.
    "bad_deploy": replace(_FLEET, faults=(Fault("bad_deploy", 5, (0, 1, 2), 15, every_s=3.0),)),
    "wrong_checkpoint": replace(_FLEET, faults=(Fault("wrong_checkpoint", 5, (0, 1, 2), 15, every_s=3.0),)),
    "grpc": replace(_FLEET, transport="grpc"),
    # One token an answer: the fleet of encoders is what is looked at.
    "scale": Scenario(1000, 300, Traffic(rate=10_000, seconds=1, num_generated=1)),
}

NAMES = (*SCENARIOS, "random")


def random_scenario(seed: int) -> Scenario:
    """A small scenario with anything in it."""
    rng = random.Random(f"{seed} scenario")
    num_encoders, num_workers, seconds = rng.randint(1, 6), rng.randint(1, 4), rng.choice([0.5, 1.0, 2.0])
    traffic = Traffic(
        rate=rng.choice([2, 5, 10, 20]),
        seconds=seconds,
        pattern=rng.choice(["steady", "burst", "diurnal", "agents"]),
        num_pictures=rng.choice([(1,), (0, 1), (1, 2, 4), (1, 8)]),
        repeated=rng.choice([0.0, 0.3, 0.9]),
        viral=rng.choice([0.0, 0.0, 0.5]),
        num_generated=rng.choice([1, 4, 16]),
    )
    faults = tuple(
        _random_fault(rng, num_encoders, num_workers, seconds) for _ in range(rng.choice([0, 0, 1, 1, 2, 4]))
    )
    limits = EncoderLimits()
    limits = replace(
        limits,
        max_batch_patches=rng.choice([limits.max_batch_patches, 8192, 1024]),
        max_queued_s=rng.choice([limits.max_queued_s, 0.5, 0.05]),
        max_held_nbytes=rng.choice([limits.max_held_nbytes, 4 << 20]),
        cache_nbytes=rng.choice([limits.cache_nbytes, 64 << 20, 0]),
        pool_nbytes=rng.choice([limits.pool_nbytes, 256 << 20]),
    )
    workers = WorkerLimits(
        max_num_seqs=rng.choice([64, 4]),
        kv_tokens=rng.choice([480_000, 20_000]),
        encode_timeout_s=rng.choice([300.0, 300.0, 2.0]),
    )
    return Scenario(
        num_encoders=num_encoders,
        num_workers=num_workers,
        traffic=traffic,
        faults=faults,
        transport=rng.choice(sorted(LINKS)),
        encoder_limits=limits,
        worker_limits=workers,
        hardware=Hardware(rng.choice(sorted(GPUS)), rng.choice(["bf16", "fp8"])),
    )


def _random_fault(rng: random.Random, num_encoders: int, num_workers: int, seconds: float) -> Fault:
    return Fault(
        rng.choice(FAULT_KINDS),
        rng.uniform(0, seconds),
        _some(rng, num_encoders),
        rng.choice([0.5, 5.0, 30.0]),
        rng.choice([3.0, 50.0]),
        workers=_some(rng, num_workers),
        every_s=rng.choice([0.0, 0.3]),
        loss=rng.choice([0.0, 0.1]),
    )


def _some(rng: random.Random, number: int) -> tuple[int, ...]:
    """One or more of the numbers below this one."""
    return tuple(sorted(rng.sample(range(number), rng.randint(1, number))))


def scenario_of(name: str, seed: int) -> Scenario:
    """The scenario of this name, one of NAMES; "random" is another one for each seed."""
    return random_scenario(seed) if name == "random" else SCENARIOS[name]
