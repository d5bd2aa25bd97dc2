"""Who waits for whom on a GPU: `python -m benchmarks.timeline` puts one load on Vitrine and records both halves.

It starts a server of `benchmarks.compare`, whose services record when each step and each batch was launched, began and
ended on the device, and writes `timeline.md` and `timeline.png`: shares of the time, durations alone and beside the
other half, and the gaps between a process's steps by their cause. --small does the same on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.chat_load import ChatClient
from benchmarks.compare import workloads
from benchmarks.compare.measuring import Target, TimeLimits, interference_for, measure
from benchmarks.compare.running_server import RunningServer, ServerFailed
from benchmarks.compare.server_file import ProcessSpec, ServerSpec, free_ports
from benchmarks.compare.workloads import Workload
from benchmarks.timeline.page import save_plot, tables
from benchmarks.timeline.recorded_service import ENCODER, WORKER
from benchmarks.timeline.span import read_spans

_WITHOUT_DEVICE = {"vitrine_vlm.gateway", "nvidia-cuda-mps-control"}
_LIMITS = TimeLimits(warm_up_s=10.0, load_s=30.0)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    selection = workloads.SMALL if options.small else workloads.selected()
    if not 0 <= options.load < len(selection):
        print(f"there is no load {options.load}:\n{workloads.listing(selection)}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        page = asyncio.run(_record(ServerSpec.read(options.server), selection[options.load], options))
    except (ServerFailed, ValueError, OSError) as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 1
    (options.output / "timeline.md").write_text(page)
    print(page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__)
    parser.add_argument("--server", default="vitrine", help="as for benchmarks.compare; default: %(default)s")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="for {model}; default: %(default)s")
    parser.add_argument("--load-format", default="auto", help="for {load_format}: auto, or dummy for random weights")
    parser.add_argument(
        "--load", type=int, default=0, metavar="N", help="the number of a load, as benchmarks.compare --list has them"
    )
    parser.add_argument("--small", action="store_true", help="N is of two small loads, for any machine")
    parser.add_argument("--shown-ms", type=float, default=500.0, help="the plot's width; default: %(default)g")
    parser.add_argument("--output", type=Path, default=Path("timeline"), help="folder; default: %(default)s")
    return parser


async def _record(spec: ServerSpec, workload: Workload, options: argparse.Namespace) -> str:
    output: Path = options.output
    values = {"model": options.model, "load_format": options.load_format, "python": sys.executable}
    ports = free_ports(sorted(spec.port_names()))
    filled = spec.filled({**values, **ports})
    files = {each.name: output / f"{each.name}.jsonl" for each in filled.processes if uses_device(each)}
    filled = filled.model_copy(update={"processes": recorded(filled.processes, files)})
    async with (
        interference_for([workload], seed=0) as interference,
        RunningServer.started(filled, ports["port"], output) as server,
    ):
        await server.wait_ready()
        if interference:
            await interference.wait_ready()
        async with ChatClient.connected(server.url) as client:
            target = Target(filled.name, server.url, client, interference)
            load = (await server.unless_failed(measure(workload, target, _LIMITS))).load
            end_s = time.monotonic()
    begin_s = end_s - load.seconds
    spans = {name: read_spans(file, begin_s, end_s) for name, file in files.items()}
    if importlib.util.find_spec("matplotlib") is not None:
        middle_s, half_s = (begin_s + end_s) / 2, min(options.shown_ms / 1e3, load.seconds) / 2
        save_plot(output / "timeline.png", spans, middle_s - half_s, middle_s + half_s)
    head = f"{filled.name}, {workload.name}: {load.requests_per_s:.2f} requests/s, {len(load.failures)} failures, "
    return f"{head}{load.seconds:.1f} s\n\n{tables(spans, load.seconds)}\n"


def uses_device(process: ProcessSpec) -> bool:
    """Whether there is something to record: a gateway and the daemon of MPS compute nothing on a device."""
    command = process.command.split() if isinstance(process.command, str) else process.command
    return _WITHOUT_DEVICE.isdisjoint(command)


def recorded(processes: Sequence[ProcessSpec], files: Mapping[str, Path]) -> list[ProcessSpec]:
    """The processes, those of them recorded that have a file.

    Raises:
        ValueError: one of these is not started as `python -m MODULE`.
    """
    return [_recorded(each, files[each.name]) if each.name in files else each for each in processes]


def _recorded(process: ProcessSpec, file: Path) -> ProcessSpec:
    """The process with its service recorded.

    Raises:
        ValueError: it is not started as `python -m MODULE`.
    """
    command = [each for each in process.command if each != "-P"]  # which keeps `benchmarks` from being found
    for module in (ENCODER, WORKER):
        if module in command and command[(place := command.index(module)) - 1] == "-m":
            command[place : place + 1] = ["benchmarks.timeline.recorded_service", str(file), module]
            return process.model_copy(update={"command": command})
    raise ValueError(f"{process.name} is not started by a list with -m {ENCODER} or -m {WORKER}: {process.command}")


if __name__ == "__main__":
    sys.exit(main())
