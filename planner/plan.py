"""Chooses the fewest encoders and workers with which the goals hold, and says what to expect of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitrine_vlm.planner.costs import Costs
from vitrine_vlm.planner.demand import Demand, demand_of, num_gpus
from vitrine_vlm.planner.fleet import Expected, run_monoliths, run_split
from vitrine_vlm.planner.workload import at_rate
from vitrine_vlm.simulation.worker import WorkerLimits
from vitrine_vlm.simulation.workload import SimulatedRequest

# GPUs are not planned to be busier than this: queues grow without bound near 1.
MAX_UTILIZATION = 0.8
# Sizes that are run until the goals hold.
_MAX_RUNS = 8
# Larger fleets are simulated at this size with as much less traffic: 3 ms of CPU time a request are the limit.
_MAX_SIMULATED_GPUS = 24
# What a network carries of its nominal bits, at most.
_NETWORK_PART = 0.7
_NETWORKS_GBIT = (10, 25, 50, 100, 200, 400)


@dataclass(frozen=True)
class Goals:
    """ttft_s, itl_s: seconds that `percentile` percent of the requests meet, one of 50, 90 and 99."""

    ttft_s: float = 0.5
    itl_s: float = 0.03
    percentile: int = 99


@dataclass(frozen=True)
class Prices:
    """Of a GPU for an hour, in any currency; None where no cost is wanted."""

    encoder: float
    worker: float


@dataclass(frozen=True)
class Plan:
    """
    encoder_utilization, worker_utilization: part of the time that GPUs compute, by the formulas. nbytes_a_second: of
    embeddings, all encoders together. encoder_gbit, worker_gbit: what one GPU's network must carry. simulated_part: of
    the fleet and its traffic. misses: goals that do not hold, in words.
    """

    requests_per_s: float
    num_encoders: int
    num_workers: int
    transport: str
    goals: Goals
    demand: Demand
    encoder_utilization: float
    worker_utilization: float
    expected: Expected
    monolith: Expected
    nbytes_a_second: float
    encoder_gbit: float
    worker_gbit: float
    network: str
    cost_an_hour: float | None
    simulated_part: float
    misses: tuple[str, ...]
    source: str

    @property
    def num_gpus(self) -> int:
        return self.num_encoders + self.num_workers


def make_plan(
    requests: Sequence[SimulatedRequest],
    requests_per_s: float,
    costs: Costs,
    goals: Goals,
    *,
    transport: str = "cuda_ipc",
    prices: Prices | None = None,
) -> Plan:
    """
    Args:
        requests: some seconds of the workload. requests_per_s: their rate.
        transport: a name of the simulation's LINKS.

    Raises:
        ValueError: there are no requests.
    """
    demand = demand_of(requests, costs)
    limits = WorkerLimits(target_itl_s=goals.itl_s, target_ttft_s=goals.ttft_s)
    num_encoders = num_gpus(requests_per_s, demand.tower_s, MAX_UTILIZATION) if demand.nbytes else 0
    num_workers = num_gpus(requests_per_s, demand.worker_s, MAX_UTILIZATION)
    alone = run_split(requests[:1], costs, 1, 1, transport, limits)
    num_left = 1 if _misses(alone, goals) else _MAX_RUNS  # more GPUs do not help a request that is alone
    while True:
        part = min(1.0, _MAX_SIMULATED_GPUS / (num_encoders + num_workers))
        simulated = at_rate(requests, part) or requests[:1]
        encoders, workers = (max(1, round(part * number)) for number in (num_encoders, num_workers))
        expected = run_split(simulated, costs, encoders, workers, transport, limits)
        misses, num_left = _misses(expected, goals), num_left - 1
        if not misses or not num_left:
            break
        step = max(1, round(0.1 * (num_encoders + num_workers)))
        if num_encoders and _encoders_are_late(expected, goals):
            num_encoders += step
        else:
            num_workers += step
    nbytes = requests_per_s * demand.nbytes
    encoder_gbit, worker_gbit = (8e-9 * nbytes / max(1, number) for number in (num_encoders, num_workers))
    return Plan(
        requests_per_s=requests_per_s,
        num_encoders=num_encoders,
        num_workers=num_workers,
        transport=transport,
        goals=goals,
        demand=demand,
        encoder_utilization=requests_per_s * demand.tower_s / max(1, num_encoders),
        worker_utilization=requests_per_s * demand.worker_s / num_workers,
        expected=expected,
        monolith=run_monoliths(requests, costs, num_encoders + num_workers, limits),
        nbytes_a_second=nbytes,
        encoder_gbit=encoder_gbit,
        worker_gbit=worker_gbit,
        network=network_for(max(encoder_gbit, worker_gbit)),
        cost_an_hour=num_encoders * prices.encoder + num_workers * prices.worker if prices else None,
        simulated_part=part,
        misses=misses,
        source=costs.source,
    )


def network_for(gbit: float) -> str:
    """The slowest usual network that carries so much a GPU at 70 % of its nominal speed."""
    for nominal in _NETWORKS_GBIT:
        if gbit <= _NETWORK_PART * nominal:
            return f"{nominal} Gbit/s a GPU"
    return "CUDA IPC: no usual network carries this"


def _misses(expected: Expected, goals: Goals) -> tuple[str, ...]:
    found = [f"{expected.failed} of {expected.num_requests} requests were refused"] if expected.failed else []
    for name, values, goal_s in (("TTFT", expected.ttft_s, goals.ttft_s), ("ITL", expected.itl_s, goals.itl_s)):
        if values[goals.percentile] > goal_s:
            seconds = values[goals.percentile]
            found.append(f"{name} p{goals.percentile} is {1e3 * seconds:.0f} ms, the goal is {1e3 * goal_s:.0f} ms")
    return tuple(found)


def _encoders_are_late(expected: Expected, goals: Goals) -> bool:
    """Whether waiting for embeddings, and not the worker, takes most of the first token's time."""
    if expected.ttft_s[goals.percentile] <= goals.ttft_s:
        return False  # it is the time between tokens
    return expected.encode_s[goals.percentile] > expected.ttft_s[goals.percentile] / 2
