"""Vitrine beside other OpenAI servers on the same GPU: `python -m benchmarks.compare --servers vitrine vllm`.

Each server is described by a YAML file (benchmarks/compare/servers). They are started one after the other, measured
with the same loads, and ended. Records are kept as JSON lines in the output folder, logs in its folder `logs`, and from
the records a page in Markdown is written, with plots: --from writes it again, also from the records of several runs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import workloads
from benchmarks.compare.figures import Goals
from benchmarks.compare.gpu import find_gpu
from benchmarks.compare.machine import machine_facts, shown_environment
from benchmarks.compare.measuring import TimeLimits
from benchmarks.compare.records import command_line, read_records
from benchmarks.compare.run import Run
from benchmarks.compare.server_file import ServerSpec
from benchmarks.compare.workloads import Workload, estimated_s, listing

_QUICK_S = 300.0
_DEFAULT_LIMITS = TimeLimits(warm_up_s=10.0, load_s=30.0)
# Of a load's share of a bounded time; the rest is for drawing and for answers in flight.
_WARM_UP_PART, _LOAD_PART = 0.15, 0.6
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 if all that was asked for was measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        selection = _selection(options)
        if options.list:
            print(listing(selection))
            return 0
        if not options.no_page and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("plots need matplotlib: install vitrine-vlm[compare], or give --no-page")
        files, exit_code = options.from_files, 0
        if not files:
            files = [options.output / "records.jsonl"]
            try:
                exit_code = 0 if _measure(options, arguments, selection, files[0]) else 1
            except asyncio.CancelledError:
                exit_code = _INTERRUPTED
                if not _has_loads(files[0]):
                    return exit_code
        if not options.no_page:
            _write_page(options, files)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("servers")
    what.add_argument(
        "--servers",
        nargs="+",
        default=["vitrine", "vllm"],
        help="YAML files, or names of those shipped along; default: vitrine vllm",
    )
    what.add_argument("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="for {model}; default: %(default)s")
    what.add_argument("--load-format", default="auto", help="for {load_format}: auto, or dummy for random weights")
    what.add_argument("--gpu", type=int, default=0, help="whose energy and memory are read; default: %(default)s")
    loads = parser.add_argument_group("loads; by default a selection of the sweep, and all that is not of it")
    group = loads.add_mutually_exclusive_group()
    group.add_argument(
        "--quick",
        action="store_true",
        help=f"few loads, {_QUICK_S / 60:g} minutes for all servers, besides their starts",
    )
    group.add_argument("--full", action="store_true", help="the whole sweep")
    group.add_argument("--small", action="store_true", help="two small loads, for any machine")
    loads.add_argument("--loads", type=int, nargs="+", metavar="N", help="which of these, by their numbers")
    loads.add_argument("--list", action="store_true", help="print them with their numbers, measure nothing")
    loads.add_argument(
        "--budget-s", type=float, metavar="S", help="seconds for all loads on all servers, besides their starts"
    )
    loads.add_argument("--stop-after-s", type=float, metavar="S", help="begin no load later than this; see --resume")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("comparison"), help="folder; default: %(default)s")
    output.add_argument(
        "--resume", action="store_true", help="go on with the records there: leave out what was measured"
    )
    output.add_argument(
        "--from", dest="from_files", type=Path, nargs="+", metavar="FILE", help="files of records; measure nothing"
    )
    output.add_argument("--no-page", action="store_true", help="only records")
    output.add_argument("--ours", metavar="NAME", help="the server whose losses are listed; default: the first")
    output.add_argument("--baseline", metavar="NAME", help="the server that ratios are against; default: the second")
    goals = Goals()
    output.add_argument("--ttft-goal-ms", type=float, default=goals.ttft_ms, help="for goodput; default: %(default)g")
    output.add_argument(
        "--itl-goal-ms", type=float, default=goals.itl_ms, help="mean a token, for goodput; default: %(default)g"
    )
    return parser


def _selection(options: argparse.Namespace) -> Sequence[Workload]:
    if options.quick:
        selection = workloads.quick()
    elif options.full:
        selection = workloads.full()
    else:
        selection = workloads.SMALL if options.small else workloads.selected()
    if unknown := [number for number in options.loads or () if not 0 <= number < len(selection)]:
        raise ValueError(f"there is no load {unknown[0]}: they are 0 to {len(selection) - 1}, see --list")
    return [selection[number] for number in options.loads] if options.loads else selection


def _measure(
    options: argparse.Namespace, arguments: Sequence[str], selection: Sequence[Workload], output: Path
) -> bool:
    specs = [ServerSpec.read(each) for each in options.servers]
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError(f"two servers have the same name: {', '.join(spec.name for spec in specs)}")
    if output.exists() and not options.resume:
        raise ValueError(f"{output} has records already: give --resume to add to them, or another --output")
    done = read_records([output]).measured if output.exists() else frozenset()
    values = {"model": options.model, "load_format": options.load_format, "python": sys.executable}
    for spec in specs:
        spec.filled({**values, **dict.fromkeys(spec.port_names(), "0")})  # else it would fail when its turn comes
    logs = output.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    limits = time_limits(len(specs) * len(selection), options.quick, options.budget_s)
    print(_plan(specs, selection, limits, done), file=sys.stderr, flush=True)
    gpu = find_gpu(options.gpu)
    run = Run(
        specs,
        selection,
        limits,
        values=values,
        output=output,
        logs=logs,
        gpu=gpu,
        facts={
            "machine": machine_facts(gpu),
            "environment": shown_environment(),
            "command_line": command_line(arguments),
        },
        done=done,
        end_s=time.monotonic() + (options.stop_after_s or float("inf")),
    )
    try:
        return asyncio.run(_interruptible(run.measure_all()))
    finally:
        if gpu:
            gpu.close()


def time_limits(num_loads: int, quick: bool, budget_s: float | None) -> TimeLimits:
    """Returns how long each of `num_loads` loads may take, all servers' together."""
    if budget_s is None and not quick:
        return _DEFAULT_LIMITS
    share_s = (_QUICK_S if budget_s is None else budget_s) / num_loads
    return TimeLimits(share_s * _WARM_UP_PART, share_s * _LOAD_PART)


def _plan(
    specs: Sequence[ServerSpec], selection: Sequence[Workload], limits: TimeLimits, done: frozenset[tuple[str, str]]
) -> str:
    left = [(spec, each) for spec in specs for each in selection if (spec.name, each.name) not in done]
    seconds = sum(min(estimated_s(each), limits.load_s) for _, each in left)
    at_most = len(left) * (limits.warm_up_s + limits.load_s)
    return (
        f"{listing(selection)}\n"
        f"{len(left)} of {len(specs) * len(selection)} measurements on {', '.join(spec.name for spec in specs)}: about "
        f"{seconds / 60:.1f} min on one H200 with a model of 8B, besides starts and warm-up; at most "
        f"{limits.load_s:g} s a load and {limits.warm_up_s:g} s of warm-up, so {at_most / 60:.1f} min, besides starts, "
        f"drawing, and answers in flight at the end of a load"
    )


async def _interruptible(work: Coroutine[Any, Any, bool]) -> bool:
    """Runs it as a task that SIGINT and SIGTERM cancel, so that servers are ended on every way out."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    return await task


def _has_loads(file: Path) -> bool:
    return file.exists() and bool(read_records([file]).loads)


def _write_page(options: argparse.Namespace, files: Sequence[Path]) -> None:
    from benchmarks.compare.page import write_page  # with matplotlib, which a machine that only measures can do without

    results = read_records(files)
    goals = Goals(options.ttft_goal_ms, options.itl_goal_ms)
    page = write_page(results, options.output, options.ours, options.baseline, goals)
    print(f"wrote {page}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
