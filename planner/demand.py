"""How many seconds of a GPU one request takes in each half, by formulas over the cost models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitrine_vlm.llm_worker.engine.step_costs import StepSize, causal_pairs
from vitrine_vlm.planner.costs import Costs
from vitrine_vlm.simulation.workload import SimulatedRequest

# Sequences that share a decode step, for the estimate; the simulation has the real number.
_SHARED_DECODE = 16
# Prompt tokens of a step, for the estimate of what one costs.
_STEP_TOKENS = 2048


@dataclass(frozen=True)
class Demand:
    """Of a mean request. tower_s, prefill_s, decode_s: seconds of a GPU; nbytes: embeddings from encoder to worker.

    distinct: part of the pictures that no encoder has.
    """

    tower_s: float
    prefill_s: float
    decode_s: float
    nbytes: float
    distinct: float

    @property
    def worker_s(self) -> float:
        return self.prefill_s + self.decode_s


def demand_of(requests: Sequence[SimulatedRequest], costs: Costs) -> Demand:
    """The mean over the requests; none without any.

    - tower: each distinct picture once, in batches large enough that their fixed cost is nothing.
    - prefill: tokens at the rate of steps of 2048, and pairs of a token and one in front of it.
    - decode: a sixteenth of a step of 16 sequences a token, and the keys that it attends to.
    """
    if not requests:
        raise ValueError("there are no requests to plan for")
    tower, steps = costs.tower_cost(), costs.step_costs()
    token_s = steps.seconds(StepSize(num_prompt_tokens=_STEP_TOKENS)) / _STEP_TOKENS
    shared_s = steps.seconds(StepSize(num_decoding=_SHARED_DECODE)) / _SHARED_DECODE
    tower_s = prefill_s = decode_s = 0.0
    num_pictures = num_tokens = 0
    seen: set[str] = set()
    for request in requests:
        prompt = request.num_text + sum(picture.num_tokens for picture in request.pictures)
        for picture in request.pictures:
            num_pictures += 1
            num_tokens += picture.num_tokens
            if picture.key not in seen:
                seen.add(picture.key)
                tower_s += tower.seconds(picture.grid_thw) + costs.picture_s
        prefill_s += prompt * token_s + steps.per_pair_s * causal_pairs(0, prompt)
        decoded = request.num_generated - 1  # the first token is the prompt's
        decode_s += decoded * (shared_s + steps.per_key_s * (prompt + decoded / 2))
    number = len(requests)
    return Demand(
        tower_s / number,
        prefill_s / number,
        decode_s / number,
        costs.row_nbytes * num_tokens / number,
        len(seen) / num_pictures if num_pictures else 1.0,
    )


def num_gpus(requests_per_s: float, seconds: float, utilization: float) -> int:
    """GPUs that do so many seconds of work a request, busy for this part of their time at most; one at least."""
    return max(1, math.ceil(requests_per_s * seconds / utilization - 1e-9))
