"""A plan as a table for readers, as JSON, and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vitrine_vlm.planner.fleet import Expected
from vitrine_vlm.planner.plan import Plan

# Hosts have so many GPUs, mostly.
_GPUS_A_HOST = 8


def as_json(plan: Plan, values: dict[str, Any]) -> str:
    """All figures in seconds, bytes and the currency of the prices, with the chart's values as `helm`."""
    return json.dumps({**asdict(plan), "num_gpus": plan.num_gpus, "helm": values}, indent=2)


def as_table(plan: Plan, values: dict[str, Any]) -> str:
    """Lines for a terminal."""
    rows = [
        ("encoder GPUs", f"{plan.num_encoders}", f"{plan.encoder_utilization:.0%} busy"),
        ("worker GPUs", f"{plan.num_workers}", f"{plan.worker_utilization:.0%} busy"),
        ("embeddings", f"{1e-9 * plan.nbytes_a_second:.2f} GB/s", f"over {plan.transport}"),
        ("network of an encoder", f"{plan.encoder_gbit:.1f} Gbit/s", f"of a worker {plan.worker_gbit:.1f} Gbit/s"),
        ("network needed, if not CUDA IPC", plan.network, ""),
    ]
    if plan.cost_an_hour is not None:
        million = 1e6 * plan.cost_an_hour / 3600 / plan.requests_per_s
        rows.append(("cost an hour", f"{plan.cost_an_hour:.2f}", f"{million:.2f} for a million requests"))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{plan.requests_per_s:g} requests/s; costs: {plan.source}"]
    lines += [f"  {name:{width}}  {value:<16}  {more}".rstrip() for name, value, more in rows]
    lines += ["", f"  {'p50 / p90 / p99, ms':24} {'TTFT':>22}  {'ITL':>20}"]
    lines += [_line("split", plan.expected), _line(f"monolith on {plan.num_gpus} GPUs", plan.monolith)]
    lines += ["", *(f"MISSED: {each}" for each in plan.misses)]
    if plan.simulated_part < 1:
        lines.append(f"Simulated: {plan.simulated_part:.1%} of the fleet with as much of the traffic.")
    if plan.transport == "cuda_ipc" and plan.num_gpus > _GPUS_A_HOST:
        lines.append("CUDA IPC stays within one host: for pods on several, plan with --transport grpc.")
    return "\n".join([*lines, "Helm values:", yaml.safe_dump(values, sort_keys=False)]).rstrip()


def plot(plan: Plan, file: Path) -> None:
    """Draws the percentiles of the split and of monoliths beside the goals; the file's ending is the format.

    Raises:
        ValueError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure  # of the extra `compare`
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'vitrine-vlm[compare]'") from None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    kinds = (("TTFT", "ttft_s", plan.goals.ttft_s), ("ITL", "itl_s", plan.goals.itl_s))
    for axes, (name, field, goal_s) in zip(figure.subplots(1, 2), kinds, strict=True):
        for offset, (label, expected) in enumerate((("split", plan.expected), ("monolith", plan.monolith))):
            values = getattr(expected, field)
            places = [index + 0.4 * offset for index in range(len(values))]
            axes.bar(places, [1e3 * each for each in values.values()], width=0.4, label=label)
        axes.axhline(1e3 * goal_s, color="black", linestyle="--", label=f"goal, p{plan.goals.percentile}")
        axes.set_xticks([index + 0.2 for index in range(len(values))], [f"p{number}" for number in values])
        axes.set_title(f"{name}, ms")
    axes.legend()
    figure.suptitle(
        f"{plan.requests_per_s:g} requests/s: {plan.num_encoders} encoders and {plan.num_workers} workers, "
        f"or {plan.num_gpus} monoliths"
    )
    figure.savefig(file)


def _line(name: str, expected: Expected) -> str:
    ttft, itl = (" / ".join(f"{1e3 * each:.{digits}f}" for each in values.values()) for values, digits in _of(expected))
    failed = f"  {expected.failed} refused" if expected.failed else ""
    return f"  {name:24} {ttft:>22}  {itl:>20}{failed}"


def _of(expected: Expected) -> tuple[tuple[dict[int, float], int], tuple[dict[int, float], int]]:
    return (expected.ttft_s, 0), (expected.itl_s, 1)
