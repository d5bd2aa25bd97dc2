"""A worker without a GPU: the real scheduler over a virtual clock, on which steps take what was measured on one.

The encoder shares the GPU, as on a machine with one: while both have work, each gets half of the time.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts, StepSize
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.simulation.costs import MEASURED


@dataclass
class Load:
    """One kind of request, `in_flight` of them at a time.

    num_text: prompt tokens of text; picture: tokens of its picture, and seconds that the tower takes for it.
    """

    in_flight: int
    num_text: int
    num_generated: int
    pictures: int = 0
    picture_tokens: int = 0
    picture_s: float = 0.0


@dataclass
class Outcome:
    """What became of a request: moments in seconds."""

    load: Load
    submitted_at: float
    token_times: list[float] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.token_times) == self.load.num_generated

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.submitted_at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times)]


@dataclass
class Encoding:
    """A picture that waits for the tower, or is in it."""

    request: RequestState
    item_index: int
    num_tokens: int
    left_s: float


class Simulation:
    """A worker, an encoder on the same GPU, and clients that keep their numbers of requests in flight."""

    def __init__(
        self,
        config: TextConfig,
        loads: list[Load],
        *,
        num_blocks: int = 12000,
        costs: StepCosts | None = None,
        really: StepCosts | None = None,
        target_itl_s: float = 0.03,
        max_mixed_tokens: int = 8192,
    ) -> None:
        """
        Args:
            config: any model's, as nothing is computed.
            costs: what the worker believes at first; None for what is true. really: what steps take.
        """
        self.now = 0.0
        self.outcomes: list[Outcome] = []
        self.costs = costs if costs is not None else MEASURED.step_costs()
        self.goals = StepGoals(self.costs, target_itl_s, 0.5, max_mixed_tokens)
        smallest = replace(config, num_hidden_layers=1, num_key_value_heads=1)
        self._cache = KvCache(smallest, num_blocks, 16, torch.device("cpu"), torch.float32)
        self.scheduler = Scheduler(self._cache, 8192, 64, 32768, self.goals, prefix_cache=False, clock=lambda: self.now)
        self._really = really if really is not None else MEASURED.step_costs()
        self._live: dict[RequestState, Outcome] = {}
        self._encoding: deque[Encoding] = deque()
        for load in loads:
            for _ in range(load.in_flight):
                self._submit(load)

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            chunks = self.scheduler.schedule()
            if not chunks:
                assert self._encoding, "nothing can be computed, and nothing is encoded"
                self._encode(self._encoding[0].left_s, share=1.0)
                continue
            size, begin = StepSize.of(chunks), self.now
            self._compute(self._really.seconds(size))
            self.costs.observe(size, self.now - begin)
            for chunk in chunks:
                chunk.request.launch(chunk.stop, chunk.samples)
                self.scheduler.commit(chunk)
                if chunk.samples:
                    self._receive_token(chunk.request)

    def begun(self, load: Load, after_s: float = 0.0) -> list[Outcome]:
        """The requests of a load that had their first token, less those that had it during the first seconds."""
        of_load = (each for each in self.outcomes if each.load is load and each.token_times)
        return [each for each in of_load if each.token_times[0] > after_s]

    def _submit(self, load: Load) -> None:
        key, num_tokens = len(self.outcomes), load.picture_tokens
        request = RequestState(key, str(key), [], SampledTokens(SamplingParams(max_tokens=load.num_generated)))
        items = range(load.pictures)
        spans = tuple(MediaSpan(item, load.num_text // 2 + item * num_tokens, num_tokens, 0) for item in items)
        length = load.num_text + load.pictures * num_tokens
        prompt = ExpandedPrompt([0] * length, torch.arange(length).expand(3, -1), length, spans)
        request.set_prompt(prompt, items)
        self.scheduler.limit_length(request)
        self.scheduler.add(request)
        self._live[request] = Outcome(load, self.now)
        self.outcomes.append(self._live[request])
        self._encoding.extend(Encoding(request, item, num_tokens, load.picture_s) for item in items)

    def _receive_token(self, request: RequestState) -> None:
        request.token_arrived()
        request.append_token(0)
        outcome = self._live[request]
        outcome.token_times.append(self.now)
        if outcome.is_finished:
            del self._live[request]
            self.scheduler.remove(request)
            self._cache.release(request.table)
            request.finish()
            self._submit(outcome.load)

    def _compute(self, seconds: float) -> None:
        """Computes a step of the worker, and as much of the encoder's work as it gets done meanwhile."""
        while seconds > 0:
            part = min(seconds, self._encoding[0].left_s) if self._encoding else seconds
            if self._encoding:
                self._encode(part, share=0.5)
            else:
                self.now += part
            seconds -= part

    def _encode(self, seconds: float, share: float) -> None:
        """Does so much of the work on the first picture. share: the encoder's part of the GPU."""
        first = self._encoding[0]
        self.now += seconds / share
        first.left_s -= seconds
        if math.isclose(first.left_s, 0, abs_tol=1e-9):
            self._encoding.popleft()
            first.request.receive_embeddings(first.item_index, TensorRows(torch.zeros(first.num_tokens, 1)))
