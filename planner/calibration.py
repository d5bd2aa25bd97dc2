"""`python -m vitrine_vlm.planner.calibration`: the model of a GPU beside the loads that were measured on one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.planner.costs import Costs, costs_of
from vitrine_vlm.planner.loads import Figures, measure_encoder, measure_load
from vitrine_vlm.planner.measured_loads import MEASURED, MeasuredLoad, System
from vitrine_vlm.planner.one_gpu import AllAtOnce, Sharing, on_host
from vitrine_vlm.simulation.encoder import EncoderLimits
from vitrine_vlm.simulation.network import LINKS
from vitrine_vlm.simulation.worker import WorkerLimits

RATE_BOUND, TTFT_BOUND = 0.10, 0.20
_SHARING: dict[System, Sharing] = {
    "encoder": "apart",
    "apart": "apart",
    "turns": "shared",
    "mps": "shared",
    "vllm": "line",
    "mode_m": "shared",
}
# vLLM's own costs were not measured step by step. Fitted to its loads: its steps with prompts take so many times as
# long as our worker's.
_VLLM_PROMPTS = 1.15
# Seconds on the host in front of a request, and a pixel of its pictures, where it is not our worker's HTTP: of an
# encoder's clients, one picture at a time takes 2.2 ms longer than its stages with 560x560 pixels, 3.5 ms with
# 1920x1080; vLLM's are fitted to its loads.
_FRONT: dict[System, tuple[float, float]] = {
    "encoder": (1.9e-3, 0.8e-9),
    "vllm": (45e-3, 12e-9),
    "mode_m": (40e-3, 1e-9),
}
_VLLM_LIMITS = WorkerLimits(max_num_seqs=128, kv_tokens=110_000)
# Encoders were measured with room for all that is in flight.
_ENCODER_LIMITS = EncoderLimits(max_queued_patches=1 << 20)


@dataclass(frozen=True)
class Compared:
    """rate, ttft: what the model gives by what was measured; ttft is None where it was not measured."""

    measured: MeasuredLoad
    figures: Figures
    rate: float
    ttft: float | None

    @property
    def is_within(self) -> bool:
        return abs(self.rate - 1) <= RATE_BOUND and (self.ttft is None or abs(self.ttft - 1) <= TTFT_BOUND)


def compare(measured: MeasuredLoad) -> Compared:
    """Runs a measured load through the model, on the H200's costs."""
    costs, is_vllm = costs_of("h200", "qwen3-vl-8b"), measured.system in ("vllm", "mode_m")
    if front := _FRONT.get(measured.system):
        costs = costs.model_copy(update={"front_s": front[0], "front_a_pixel_s": front[1]})
    if is_vllm:
        costs = _of_vllm(costs)
    runs = measure_encoder if measured.system == "encoder" else measure_load
    figures = on_host(
        _SHARING[measured.system],
        LINKS[measured.transport],
        costs,
        lambda host: runs(host, measured.load, costs),
        encoder=_ENCODER_LIMITS,
        worker=_VLLM_LIMITS if is_vllm else WorkerLimits(),
        step_goals=AllAtOnce if is_vllm else StepGoals,
    )
    is_of_pictures = measured.load.beside and not is_vllm
    rate = figures.beside_per_s if is_of_pictures else figures.requests_per_s
    ttft = figures.ttft_s / measured.ttft_s if measured.ttft_s else None
    return Compared(measured, figures, rate / measured.requests_per_s, ttft)


def _of_vllm(costs: Costs) -> Costs:
    decoder = costs.decoder
    slower = decoder.model_copy(
        update={
            "mixed_s": {size: _VLLM_PROMPTS * seconds for size, seconds in decoder.mixed_s.items()},
            "per_pair_s": _VLLM_PROMPTS * decoder.per_pair_s,
        }
    )
    return costs.model_copy(update={"decoder": slower})


def table(compared: Iterable[Compared]) -> str:
    """A Markdown table, worst cases marked."""
    lines = [
        "| load | requests/s, measured / model | ratio | TTFT p50, ms, measured / model | ratio | |",
        "|---|---|---|---|---|---|",
    ]
    for each in compared:
        of, ttft = each.measured, ("", "")
        if of.ttft_s and each.ttft:
            ttft = (f"{1e3 * of.ttft_s:.0f} / {1e3 * each.figures.ttft_s:.0f}", f"{each.ttft:.2f}")
        rate = f"{of.requests_per_s:g} / {each.rate * of.requests_per_s:.3g}"
        mark = "" if each.is_within else "**off**"
        lines.append(f"| {of.name} | {rate} | {each.rate:.2f} | {ttft[0]} | {ttft[1]} | {mark} |")
    return "\n".join(lines)


def main() -> int:
    logging.basicConfig(level=logging.ERROR)
    print(table(map(compare, MEASURED)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
