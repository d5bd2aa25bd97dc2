"""Runs a small fleet under load while encoders are killed and workers replaced: `make soak`.

Three encoders, two LLM workers and a gateway, as processes, with the shipped model. First each question is asked once,
in the quiet. Then requests come at random times, at a share of what the fleet answers under the same disturbances. One
encoder, one worker and the gateway run all the time: their memory, threads and files must not grow. At the end nothing
may be held. Prints a table of what must hold; the exit status is 1 where something did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.accuracy.questions import held_out_questions
from benchmarks.soak.disturbances import Disturbance, kill_encoders, replace_workers
from benchmarks.soak.load import Outcome, SoakLoad
from benchmarks.soak.samples import Sample, keep_sampling, samples_by_name, wait_idle
from benchmarks.soak.services import ServiceEnded, Services
from benchmarks.soak.verdict import Check, checks
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

_NUM_ENCODERS, _NUM_WORKERS = 3, 2
_IN_FLIGHT = 8
_SETTLE_S, _SAMPLE_S = 5.0, 2.0
_SHOWN_CHARS = 4000  # of each log, where a service has ended
# Leases of peers that were lost end after a minute.
_IDLE_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Result:
    """A finished soak. begin, end: of the load, seconds of `time.monotonic`. requests_per_s: that were sent."""

    begin: float
    end: float
    capacity: float
    requests_per_s: float
    outcomes: list[Outcome]
    disturbances: list[Disturbance]
    samples: list[Sample]
    checks: list[Check]


async def soak(options: argparse.Namespace, logs: Path) -> Result:
    """
    Raises:
        ServiceEnded: a service ended by itself, or did not start.
    """
    questions = await asyncio.to_thread(held_out_questions, options.questions)
    running = Services.running(options.model, _NUM_ENCODERS, _NUM_WORKERS, logs)
    async with running as services:
        lasting = [services.encoders[0], services.workers[0], services.gateway]
        before: dict[str, Sample] = {}
        disturbances: list[Disturbance] = []
        samples: list[Sample] = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            load = await SoakLoad.prepared(session, services.url, questions, options.seed)
            await load.run_closed(_IN_FLIGHT, _SETTLE_S)
            await asyncio.sleep(_SETTLE_S)
            before = samples_by_name(lasting)
            until = time.monotonic() + options.calibrate_s + options.minutes * 60
            async with asyncio.TaskGroup() as group:
                kills = kill_encoders(services.encoders[1:], options.kill_every_s, until, options.seed, disturbances)
                group.create_task(kills)
                group.create_task(replace_workers(services.workers[1:], options.replace_every_s, until, disturbances))
                capacity = await load.run_closed(_IN_FLIGHT, options.calibrate_s)
                print(f"answers {capacity:.1f} requests/s under these disturbances", file=sys.stderr, flush=True)
                sampling = group.create_task(keep_sampling(services.all, _SAMPLE_S, samples))
                begin = time.monotonic()
                await load.run_open(options.share * capacity, options.minutes * 60)
                end = time.monotonic()
                sampling.cancel()
        # Its connections are closed: only what the services keep by themselves is left.
        busy = await wait_idle(services.all, _IDLE_TIMEOUT_S)
        await asyncio.sleep(_SETTLE_S)  # longer than the gateway keeps connections without a request
        after = samples_by_name(lasting)
        of_lasting = [each for each in samples if each.service in before]
        found = checks(load.outcomes, disturbances, of_lasting, before, after, busy)
    return Result(begin, end, capacity, options.share * capacity, load.outcomes, disturbances, samples, found)


def report(result: Result) -> str:
    """Returns what must hold and what was seen, as Markdown."""
    answered = [
        each for each in result.outcomes if each.error is None and not each.abandoned and each.at >= result.begin
    ]
    times = np.array([each.seconds for each in answered]) * 1e3
    lines = [
        f"{result.end - result.begin:.0f} s at {result.requests_per_s:.1f} requests/s of {result.capacity:.1f}; from "
        f"request to end of answer {np.percentile(times, 50):.0f} / {np.percentile(times, 99):.0f} / "
        f"{times.max():.0f} ms (p50 / p99 / longest)",
        "",
        "| | found | |",
        "|---|---|---|",
        *(f"| {each.name} | {each.found} | {'ok' if each.passed else '**failed**'} |" for each in result.checks),
    ]
    return "\n".join(lines)


def write_records(result: Result, file: Path) -> None:
    """Writes all that was seen, as JSON lines."""
    with file.open("w") as out:
        for name in ("outcomes", "disturbances", "samples", "checks"):
            for each in getattr(result, name):
                out.write(json.dumps({"record": name, **asdict(each)}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load; default: %(default)s")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--questions", type=int, default=66, help="different requests; default: %(default)s")
    parser.add_argument("--share", type=float, default=0.8, help="of what the fleet answers; default: %(default)s")
    parser.add_argument("--calibrate-s", type=float, default=30.0, help="to find that out, s; default: %(default)s")
    parser.add_argument("--kill-every-s", type=float, default=20.0, help="an encoder; default: %(default)s")
    parser.add_argument("--replace-every-s", type=float, default=30.0, help="a worker; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the requests, their arrivals and the kills")
    parser.add_argument("--logs", type=Path, help="folder for the services' output; default: a temporary one")
    parser.add_argument("--output", type=Path, help="file for all that was seen, as JSON lines")
    parser.add_argument("--plot", type=Path, help="file for a picture of it (PNG); needs matplotlib")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        ended: list[ServiceEnded] = []
        try:
            result = asyncio.run(soak(options, logs))
        except* ServiceEnded as group:
            ended.extend(error for error in group.exceptions if isinstance(error, ServiceEnded))
        if ended:
            print(*ended, sep="\n", file=sys.stderr)
            for log in sorted(logs.iterdir()):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-_SHOWN_CHARS:]}", file=sys.stderr)
            return 1
    if options.output:
        write_records(result, options.output)
    if options.plot:
        from benchmarks.soak.plot import draw  # matplotlib is not needed otherwise

        draw(result, options.plot)
    print(report(result))
    return 0 if all(each.passed for each in result.checks) else 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
