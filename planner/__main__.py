"""`vitrine-plan`: how many encoder and worker GPUs a workload needs, and what to expect of them."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrine_vlm.planner.calibrate import calibrate, write_costs
from vitrine_vlm.planner.costs import MODELS, Costs, costs_of, read_costs
from vitrine_vlm.planner.helm_values import helm_values
from vitrine_vlm.planner.output import as_json, as_table, plot
from vitrine_vlm.planner.plan import Goals, Plan, Prices, make_plan
from vitrine_vlm.planner.workload import Workload, rate_of
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.simulation.costs import GPUS
from vitrine_vlm.simulation.network import LINKS
from vitrine_vlm.simulation.workload import read_trace

_CHECKPOINTS = {
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
}
# So many requests are simulated, in so many seconds at least.
_NUM_REQUESTS, _MIN_S = 400, 5.0
_SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a goal is missed, 2 where something given cannot be read."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.ERROR)
    try:
        return _calibrate(given[1:]) if given[:1] == ["calibrate"] else _plan(given)
    except (OSError, ValueError) as error:
        print(f"vitrine-plan: {error}", file=sys.stderr)
        return 2


def _plan(given: Sequence[str]) -> int:
    options = _parser().parse_args(given)
    costs = read_costs(options.costs) if options.costs else costs_of(options.gpu, options.model)
    goals = Goals(options.ttft_ms / 1e3, options.itl_ms / 1e3, options.percentile)
    prices = None
    if options.price is not None:
        prices = Prices(options.price if options.encoder_price is None else options.encoder_price, options.price)
    plan = _planned(options, costs, goals, prices)
    values = helm_values(plan, _CHECKPOINTS.get(costs.model, costs.model))
    print(as_json(plan, values) if options.json else as_table(plan, values))
    if options.plot:
        plot(plan, options.plot)
    return 1 if plan.misses else 0


def _planned(options: argparse.Namespace, costs: Costs, goals: Goals, prices: Prices | None) -> Plan:
    if options.trace:
        requests = read_trace(options.trace)
        rate = rate_of(requests)
    else:
        rate = options.requests_per_s
        workload = Workload(
            rate, options.pictures, tuple(options.size), options.text_in, options.text_out, options.repeated
        )
        requests = workload.requests(max(_MIN_S, _NUM_REQUESTS / rate), _SEED)
    return make_plan(requests, rate, costs, goals, transport=options.transport, prices=prices)


def _calibrate(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitrine-plan calibrate", description="measures this machine's GPU, or CPU, and writes a file of costs"
    )
    parser.add_argument("--model", default=str(MODEL_FOLDER), help="folder or hub id; default: the shipped tiny model")
    parser.add_argument("--output", type=Path, default=Path("costs.json"), help="default: %(default)s")
    parser.add_argument("--encoder-flags", nargs="*", default=[], help="more flags for the encoder, without dashes")
    parser.add_argument("--worker-flags", nargs="*", default=[], help="more flags for the worker, without dashes")
    options = parser.parse_args(given)
    flags = [[f"--{flag}" for flag in each] for each in (options.encoder_flags, options.worker_flags)]
    costs = calibrate(options.model, *flags)
    write_costs(costs, options.output)
    print(f"{options.output}: {costs.model} on {costs.gpu}; plan with --costs {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitrine-plan", description=__doc__, epilog="`vitrine-plan calibrate` measures your own GPU."
    )
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--requests-per-s", type=_positive, help="requests a second")
    load.add_argument("--trace", type=Path, help="JSON lines of requests, as for the simulation")
    parser.add_argument("--pictures", type=_whole, default=1, help="pictures a request; default: %(default)s")
    parser.add_argument(
        "--size", type=_size, nargs="+", default=[(1920, 1080)], metavar="WxH", help="one as likely as another"
    )
    parser.add_argument("--text-in", type=_count, default=200, help="tokens of text; default: %(default)s")
    parser.add_argument("--text-out", type=_count, default=64, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--repeated", type=_part, default=0.0, help="part of pictures that came before, 0 to 1")
    parser.add_argument("--ttft-ms", type=_positive, default=500.0, help="goal; default: %(default)s")
    parser.add_argument("--itl-ms", type=_positive, default=30.0, help="goal; default: %(default)s")
    parser.add_argument("--percentile", type=int, choices=(50, 90, 99), default=99, help="of both goals")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="only the H200 was measured; others are scaled")
    parser.add_argument("--model", choices=MODELS, default="qwen3-vl-8b", help="only the 8B was measured")
    parser.add_argument("--costs", type=Path, help="a file of `vitrine-plan calibrate`, in place of --gpu and --model")
    parser.add_argument("--transport", choices=LINKS, default="cuda_ipc", help="cuda_ipc within a host, grpc beyond")
    parser.add_argument("--price", type=_positive, help="of a worker's GPU for an hour")
    parser.add_argument("--encoder-price", type=_positive, help="of an encoder's GPU, if it is another")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw the percentiles into this file")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _part(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 1920x1080")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
