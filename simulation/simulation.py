"""Runs a scenario from its first request until everything has ended."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitrine_vlm.simulation.costs import GpuCosts
from vitrine_vlm.simulation.fleet import Fleet
from vitrine_vlm.simulation.network import LINKS
from vitrine_vlm.simulation.scenario import Scenario
from vitrine_vlm.simulation.virtual_loop import NothingLeft, VirtualLoop, new_virtual_loop
from vitrine_vlm.simulation.worker import Outcome, SimulatedWorker
from vitrine_vlm.simulation.workload import SimulatedRequest

# Requests leave few cycles, and every collection looks through all that is in flight.
_GC_THRESHOLDS = (50_000, 20, 20)
# Within this time after the last request all leases are released, or have expired.
_MAX_SETTLE_S = 120
# No request may take longer than this behind the last one's arrival: services' own loops never end, so that the clock
# would run on.
_MAX_SERVING_S = 3600


@dataclass(frozen=True)
class Run:
    """What came of a scenario.

    outcomes: of the requests, in the order of their arrival. virtual_s: until the last request had ended; cpu_s: CPU
    time that the simulation took. num_callbacks: of the event loop.
    """

    scenario: Scenario
    requests: Sequence[SimulatedRequest]
    outcomes: list[Outcome]
    fleet: Fleet
    virtual_s: float
    cpu_s: float
    num_callbacks: int


def simulate(
    scenario: Scenario,
    seed: int,
    requests: Sequence[SimulatedRequest] | None = None,
    begin: Callable[[Fleet], None] = lambda fleet: None,
    costs: GpuCosts | None = None,
) -> Run:
    """
    Args:
        requests: in the order of their arrival; by default those of the scenario's traffic.
        begin: called on the event loop before the first request, to plan what else happens to the fleet.
        costs: of all GPUs; by default those of the scenario's hardware.

    Raises:
        NothingLeft: a request can never end.
        RuntimeError: a task of the product has failed.
    """
    if requests is None:
        requests = scenario.traffic.requests(seed)
    loop = new_virtual_loop()
    start = time.process_time()
    thresholds = gc.get_threshold()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        outcomes, fleet, virtual_s = loop.run(_run(loop, scenario, seed, requests, begin, costs or scenario.hardware))
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    cpu_s = time.process_time() - start
    return Run(scenario, requests, outcomes, fleet, virtual_s, cpu_s, loop.num_callbacks)


async def _run(
    loop: VirtualLoop,
    scenario: Scenario,
    seed: int,
    requests: Sequence[SimulatedRequest],
    begin: Callable[[Fleet], None],
    costs: GpuCosts,
) -> tuple[list[Outcome], Fleet, float]:
    fleet = Fleet(
        loop,
        num_encoders=scenario.num_encoders,
        num_workers=scenario.num_workers,
        num_zones=scenario.num_zones,
        link=LINKS[scenario.transport],
        encoder_limits=scenario.encoder_limits,
        worker_limits=scenario.worker_limits,
        seed=seed,
        costs=costs,
    )
    fleet.plan(scenario.faults)
    begin(fleet)
    gc.freeze()  # the fleet stays as long as the run: no collection of garbage should look through it again
    outcomes: list[Outcome] = []
    serving: set[asyncio.Task[None]] = set()
    for number, request in enumerate(requests):
        await loop.after(request.at - loop.time())
        # A front that sends requests to workers in turns.
        worker: SimulatedWorker = fleet.workers[number % len(fleet.workers)]
        outcomes.append(Outcome(request))
        task = loop.create_task(worker.serve(outcomes[-1]))
        serving.add(task)
        task.add_done_callback(serving.discard)
    try:
        async with asyncio.timeout(_MAX_SERVING_S):
            while serving:
                await asyncio.wait(serving)
    except TimeoutError:
        raise NothingLeft(
            f"{len(serving)} requests have not ended {_MAX_SERVING_S} s after the last one came"
        ) from None
    virtual_s = loop.time()
    for _ in range(_MAX_SETTLE_S):
        await asyncio.sleep(1.0)
        if not fleet.left_behind():
            break
    return outcomes, fleet, virtual_s
