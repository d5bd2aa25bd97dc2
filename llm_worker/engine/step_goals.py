"""Decides how many prompt tokens a step takes that also decodes.

Prompts and decoding requests compete for the time of each step:
- Prompt tokens that hardly lengthen a step are always taken: up to about a hundred, a GPU is busy reading weights.
- A step takes the fewest prompt tokens with which all queued prompts still meet the goal for their first token (TTFT),
  if every later step takes as many. The goal counts from when a prompt could be computed as a whole: what it waited
  for its media is not made up at the cost of those that decode.
- A step ends within the goal for the time between tokens (ITL), as the cost model predicts. It comes near this goal
  only where about as many prompts are queued as requests decode: a longer step delays these, and hastens those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitrine_vlm.llm_worker.engine.capture_sizes import token_capture_sizes
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts, StepSize, causal_pairs

# A step with prompt tokens that takes at most this much longer than without is as good as without.
_GENTLE = 1.25
# Part of the time left until a first token is due that its prompt should take: an encoder on the same GPU makes steps
# longer in bursts, and with few requests in flight an early first token is throughput.
_PLANNED_PART = 0.3
# Queued prompts for each request that decodes: up to the first number steps stay gentle, from the second on they may be
# as long as the goal.
_FEW_QUEUED, _MANY_QUEUED = 0.5, 1.0
# Prompt tokens that every step takes, whatever they cost, so that prompts proceed beside any number of streams.
_LEAST_TOKENS = 32


class StepGoals:
    """
    num_itl_missed, num_ttft_missed: steps since the start that are predicted to miss the goal, or with which a queued
        prompt misses it.
    """

    def __init__(self, costs: StepCosts, target_itl_s: float, target_ttft_s: float, max_tokens: int) -> None:
        """
        Args:
            max_tokens: most tokens of a step that also decodes; prompts get a quarter of it at least, up to 32.
        """
        self.num_itl_missed = 0
        self.num_ttft_missed = 0
        self._costs = costs
        self._target_itl_s, self._target_ttft_s = target_itl_s, target_ttft_s
        self._max_tokens = max_tokens
        self._least = min(_LEAST_TOKENS, max(1, max_tokens // 4))
        self._sizes = token_capture_sizes(max_tokens)

    def num_prompt_tokens(
        self, decoding: Sequence[RequestState], prefilling: Sequence[RequestState], now: float
    ) -> int:
        """Prompt tokens of the next step.

        Args:
            decoding: the requests that decode in it. prefilling: those with more to compute, in order. None is empty.
            now: seconds of the clock that `RequestTimings.ready_at` is of.
        """
        num_decoding, num_keys = len(decoding), sum(request.num_computed for request in decoding)
        spans = [(request.num_computed, request.num_runnable) for request in prefilling]
        goal_rate = self._goal_rate(prefilling, now)
        gentle_s = _GENTLE * self._costs.seconds(StepSize(num_decoding, num_keys))
        limit_s = self._limit_s(num_decoding, prefilling, gentle_s)
        chosen, chosen_s = 0, 0.0
        for num_tokens, num_pairs in _with_pairs(spans, self._candidates(num_decoding, spans)):
            seconds = self._costs.seconds(StepSize(num_decoding, num_keys, num_tokens, num_pairs))
            is_enough = chosen >= goal_rate / _PLANNED_PART * chosen_s
            if chosen and (seconds > limit_s or (is_enough and seconds > gentle_s)):
                break
            chosen, chosen_s = num_tokens, seconds
        self.num_itl_missed += chosen_s > self._target_itl_s
        self.num_ttft_missed += chosen < goal_rate * chosen_s
        return chosen

    def _goal_rate(self, prefilling: Sequence[RequestState], now: float) -> float:
        """Prompt tokens a second with which every prompt that is ready meets its goal just so."""
        rate, num_tokens = 0.0, 0
        for request in prefilling:
            num_tokens += request.num_runnable - request.num_computed
            timings = request.timings
            if timings.first_token_at is not None:
                return math.inf  # preempted: its next token is late already
            if timings.ready_at is not None:
                left_s = timings.ready_at + self._target_ttft_s - now
                rate = max(rate, num_tokens / left_s if left_s > 0 else math.inf)
        return rate

    def _limit_s(self, num_decoding: int, prefilling: Sequence[RequestState], gentle_s: float) -> float:
        """The longest step that the number of queued prompts justifies."""
        num_queued = sum(request.timings.ready_at is not None for request in prefilling)
        part = (num_queued / num_decoding - _FEW_QUEUED) / (_MANY_QUEUED - _FEW_QUEUED)
        gentle_s = min(gentle_s, self._target_itl_s)
        return gentle_s + min(max(part, 0.0), 1.0) * (self._target_itl_s - gentle_s)

    def _candidates(self, num_decoding: int, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Numbers of prompt tokens, ascending, that fill a captured size; the last is all that may be taken."""
        num_all = sum(stop - start for start, stop in spans)
        most = min(num_all, max(self._max_tokens - num_decoding, self._least))
        sizes = (size - num_decoding for size in self._sizes)
        return [*(size for size in sizes if self._least <= size < most), most]


def _with_pairs(spans: Sequence[tuple[int, int]], candidates: Sequence[int]) -> list[tuple[int, int]]:
    """Each candidate with the attention pairs of so many tokens, taken from the spans one after the other."""
    found: list[tuple[int, int]] = []
    index = num_before = pairs_before = 0
    for num_tokens in candidates:
        start, stop = spans[index]
        while num_tokens - num_before > stop - start:
            num_before += stop - start
            pairs_before += causal_pairs(start, stop)
            index += 1
            start, stop = spans[index]
        found.append((num_tokens, pairs_before + causal_pairs(start, start + num_tokens - num_before)))
    return found
