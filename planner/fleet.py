"""Runs a short piece of the workload through the fleet's own policies, split and as monoliths."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitrine_vlm.planner.costs import Costs
from vitrine_vlm.planner.one_gpu import Host, on_host
from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.network import LINKS
from vitrine_vlm.simulation.report import report
from vitrine_vlm.simulation.scenario import Scenario, Traffic
from vitrine_vlm.simulation.simulation import simulate
from vitrine_vlm.simulation.worker import Outcome, WorkerLimits
from vitrine_vlm.simulation.workload import SimulatedRequest

_PERCENTILES = (50, 90, 99)
_SEED = 0


@dataclass(frozen=True)
class Expected:
    """What users see. ttft_s, itl_s: percentiles by their number, itl_s of requests' means; failed: requests without
    an answer. encode_s: until all embeddings of a request are there. encoder_utilization: part of the time that towers
    compute, None of monoliths.
    """

    ttft_s: dict[int, float]
    itl_s: dict[int, float]
    num_requests: int
    failed: int
    encode_s: dict[int, float]
    encoder_utilization: float | None


def run_split(
    requests: Sequence[SimulatedRequest],
    costs: Costs,
    num_encoders: int,
    num_workers: int,
    transport: str,
    limits: WorkerLimits,
) -> Expected:
    """Encoders and workers on GPUs of their own.

    Raises:
        RuntimeError: the simulation has a fault, so that its figures mean nothing.
    """
    traffic = Traffic(rate=1.0, seconds=1.0)  # unused: the requests are given
    scenario = Scenario(num_encoders, num_workers, traffic, transport=transport, worker_limits=limits)
    run = simulate(scenario, _SEED, requests, costs=costs)
    if found := violations(run):
        raise RuntimeError(f"{len(found)} checks of the simulated fleet have failed, this is a bug: {found[0]}")
    return replace(_expected(run.outcomes, costs), encoder_utilization=report(run).tower_utilization)


def run_monoliths(requests: Sequence[SimulatedRequest], costs: Costs, num_gpus: int, limits: WorkerLimits) -> Expected:
    """As many processes that have both halves, to which requests go in turns; one of them is run."""
    own = requests[::num_gpus]

    async def work(host: Host) -> list[Outcome]:
        async def ask(request: SimulatedRequest) -> Outcome:
            await asyncio.sleep(request.at)
            return await host.worker.answer(request)

        return list(await asyncio.gather(*map(ask, own)))

    outcomes = on_host("line", LINKS["cuda_ipc"], costs, work, worker=limits)
    return _expected(outcomes, costs)


def _expected(outcomes: Sequence[Outcome], costs: Costs) -> Expected:
    done = [each for each in outcomes if each.error is None]
    ttft_s, encode_s, itl_s = [], [], []
    for each in done:
        assert each.first_token_at is not None and each.ended_at is not None
        pixels = sum(picture.height * picture.width for picture in each.request.pictures)
        front_s = costs.front_s + costs.front_a_pixel_s * pixels
        ttft_s.append(front_s + each.first_token_at - each.request.at)
        if each.embeddings_at is not None and pixels:
            encode_s.append(each.embeddings_at - each.request.at)
        if each.num_tokens > 1:
            itl_s.append((each.ended_at - each.first_token_at) / (each.num_tokens - 1))
    return Expected(
        _percentiles(ttft_s),
        _percentiles(itl_s),
        len(outcomes),
        len(outcomes) - len(done),
        _percentiles(encode_s),
        None,
    )


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    """Zeros where there are no values."""
    ranked = sorted(values)
    return {number: ranked[(len(ranked) - 1) * number // 100] if ranked else 0.0 for number in _PERCENTILES}
