"""`python -m vitrine_vlm.simulation --scenario NAME --seed N`: runs the fleet's policies against a virtual clock."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.costs import GPUS
from vitrine_vlm.simulation.report import digest, report
from vitrine_vlm.simulation.scenario import NAMES, scenario_of
from vitrine_vlm.simulation.simulation import simulate
from vitrine_vlm.simulation.workload import read_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a check has failed."""
    parser = argparse.ArgumentParser(prog="python -m vitrine_vlm.simulation", description=__doc__)
    parser.add_argument("--scenario", choices=sorted(NAMES), default="steady")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same run")
    parser.add_argument("--seconds", type=float, help="how long requests come, instead of the scenario's")
    parser.add_argument("--rate", type=float, help="requests a second, instead of the scenario's")
    parser.add_argument("--encoders", type=int, help="number of encoders, instead of the scenario's")
    parser.add_argument("--workers", type=int, help="number of workers, instead of the scenario's")
    parser.add_argument("--trace", type=Path, help="JSON lines of requests, instead of the scenario's traffic")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="whose costs are taken; only the H200's are measured")
    parser.add_argument("--decoder", choices=["bf16", "fp8"], help="the decoder's weights")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.CRITICAL)  # what processes log on faults is expected
    scenario = scenario_of(options.scenario, options.seed)
    traffic = replace(
        scenario.traffic,
        seconds=options.seconds or scenario.traffic.seconds,
        rate=options.rate or scenario.traffic.rate,
    )
    scenario = replace(
        scenario,
        traffic=traffic,
        num_encoders=options.encoders or scenario.num_encoders,
        num_workers=options.workers or scenario.num_workers,
        hardware=replace(
            scenario.hardware,
            gpu=options.gpu or scenario.hardware.gpu,
            decoder=options.decoder or scenario.hardware.decoder,
        ),
    )
    run = simulate(scenario, options.seed, read_trace(options.trace) if options.trace else None)
    figures, failed = report(run), violations(run)
    if options.json:
        print(json.dumps({"seed": options.seed, "digest": digest(run), **asdict(figures), "violations": failed}))
    else:
        print(f"{options.scenario}, seed {options.seed}, digest {digest(run)}", *figures.lines(), sep="\n")
        print(*(f"VIOLATED: {each}" for each in failed) if failed else ["all checks passed"], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
