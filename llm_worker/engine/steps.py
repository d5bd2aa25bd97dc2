"""What happens to the chunks of a step: landed, run, sampled from, and taken in as far as they count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedding_transport.errors import InternalError, LeaseExpired, VitrineError
from embedding_transport.gpu_faults import is_lost
from llm_worker.engine.forward_pass import ForwardPass, StepOutput
from llm_worker.engine.kv_rows import land_kv
from llm_worker.engine.request import TokenOutput
from llm_worker.engine.sampler import Choice, NextToken, choose
from llm_worker.engine.scheduler import Chunk, Scheduler
from llm_worker.engine.sequence import Sequence

_log = logging.getLogger(__name__)
# How often a request's media rows are asked for anew before it fails, with none landed in between: all of a request
# that waited for long may be lost, and are found so one chunk after the other.
_MAX_LOST_ROWS = 3


@dataclass(frozen=True)
class Step:
    """That has started: the chunks that are computed, and the tokens that come out. begin: on the clock."""

    chunks: list[Chunk]
    output: StepOutput
    choice: Choice
    begin: float


class Steps:
    """Belongs to the engine's thread.

    num_steps, num_prefill_tokens, num_decode_tokens: since the start.
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        scheduler: Scheduler,
        end: Callable[[Sequence, bool], None],
        fail: Callable[[Sequence, VitrineError], None],
        on_gpu_lost: Callable[[], object],
    ) -> None:
        """
        Args:
            end: called with a sequence that has its last token, and whether its blocks are kept.
            fail: called with one that cannot go on, and why.
            on_gpu_lost: called where the GPU will run no other step after one that failed.
        """
        self._forward_pass, self._scheduler = forward_pass, scheduler
        self._end, self._fail, self._on_gpu_lost = end, fail, on_gpu_lost
        self.num_steps = self.num_prefill_tokens = self.num_decode_tokens = 0

    def land_kv(self) -> bool:
        """Lands the KV of one prompt that came from elsewhere; of one only, so that others need not wait for more."""
        sequence = next((each for each in self._scheduler.running if each.kv is not None), None)
        if sequence is None:
            return False
        assert sequence.kv is not None
        begin = time.perf_counter()
        chunk = Chunk(sequence, sequence.num_computed, sequence.num_prompt_tokens, samples=False)
        try:
            with torch.inference_mode():
                slots_T = sequence.blocks.slots[chunk.start : chunk.stop]
                land_kv(sequence.kv, chunk.start - sequence.kv_first, self._forward_pass.kv_cache.layers, slots_T)
        except Exception as error:
            self._landing_failed(chunk, error)
            return True
        self._scheduler.started(chunk)
        self._scheduler.computed(chunk)
        sequence.release_kv()
        sequence.land_s += time.perf_counter() - begin
        return True

    def start(self, chunks: list[Chunk]) -> Step | None:
        """None where it failed."""
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                output = self._forward_pass(chunks)
                choice = self._choose(output)
                self._forward_pass.token_pool.write(output.pool_rows_B, choice.token_ids_B)
        except Exception as error:
            self._step_failed(chunks, error)
            return None
        for chunk in chunks:
            if chunk in output.failed:
                self._landing_failed(chunk, output.failed[chunk])
            else:
                self._scheduler.started(chunk)
                chunk.sequence.num_in_flight += chunk.samples
        return Step([chunk for chunk in chunks if chunk not in output.failed], output, choice, begin)

    def can_be_followed(self, step: Step) -> bool:
        """Whether what comes next can start before the tokens are known that the step makes."""
        return self._forward_pass.reads_token_pool or all(
            chunk.sequence.num_runnable <= chunk.stop for chunk in step.output.sampling
        )

    def finish(self, step: Step, *, followed: bool) -> None:
        """Waits for its result, and takes it in as far as it still counts.

        Args:
            followed: the next step has started.
        """
        output = step.output
        try:
            if followed or output.landed:
                step.choice.wait()
            lost = self._lost(output)
            next_tokens = step.choice.read() if output.sampling else []
        except Exception as error:
            self._step_failed([chunk for chunk in step.chunks if chunk.counts], error)
            return
        computed = [chunk for chunk in step.chunks if chunk.counts and chunk not in lost]
        self._account(computed, time.perf_counter() - step.begin)
        for chunk in computed:
            if output.landed.get(chunk):
                chunk.sequence.num_lost_rows = 0
        for chunk, reason in lost.items():
            self._landing_failed(chunk, reason)
        for chunk, next_token in zip(output.sampling, next_tokens, strict=True):
            if chunk.counts:
                chunk.sequence.num_in_flight -= 1
                self.take_token(chunk.sequence, next_token)

    def take_token(self, sequence: Sequence, next_token: NextToken) -> None:
        """Makes it the sequence's next token, which may be its last."""
        token_id = next_token.token_id
        if token_id is None:
            self._fail(sequence, InternalError("the model's output is not a number: there is no next token to draw"))
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = time.perf_counter()
        sequence.token_ids.append(token_id)
        finish_reason = None
        if token_id in sequence.sampling.stop_token_ids:
            finish_reason = "stop"
        elif len(sequence.token_ids) >= sequence.max_total_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            self._end(sequence, sequence.keep_kv)
        sequence.deliver(TokenOutput(token_id, next_token.logprobs, finish_reason), sequence.timings())

    def _lost(self, output: StepOutput) -> dict[Chunk, Exception]:
        """Chunks whose media rows were taken back before, or while, they were landed."""
        lost: dict[Chunk, Exception] = {}
        for chunk, checks in output.landed.items():
            try:
                for check in checks if chunk.counts else ():
                    check()
            except Exception as error:  # of one request, and nothing to the others
                lost[chunk] = error
        return lost

    def _choose(self, output: StepOutput) -> Choice:
        """The next tokens of the chunks that end at their sequence's last token."""
        sequences = [chunk.sequence for chunk in output.sampling]
        uniform = [0.0 if each.sampling.is_greedy else each.uniform(each.num_generated) for each in sequences]
        return choose(output.logits_BV, [each.sampling for each in sequences], uniform)

    def _step_failed(self, chunks: list[Chunk], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        # First: with its GPU the worker fails, and then its requests may go elsewhere.
        if is_lost(self._forward_pass.decoder.device):
            self._on_gpu_lost()
        for chunk in chunks:
            self._fail(chunk.sequence, InternalError(f"the step failed: {type(error).__name__}"))

    def _landing_failed(self, chunk: Chunk, error: Exception) -> None:
        """The chunk does not count. Rows that were lost on the way are asked for again, else the request fails."""
        sequence = chunk.sequence
        sequence.go_back(chunk.start)
        if isinstance(error, LeaseExpired) and sequence.num_lost_rows < _MAX_LOST_ROWS:
            _log.warning("request %r: %s", sequence.request_id[:64], error)
            sequence.num_lost_rows += 1
            if sequence.request_kv is not None:
                sequence.release_kv()
            else:
                sequence.release_rows({span.item_index for span in sequence.spans_in(chunk.start, chunk.stop)})
            return
        if not isinstance(error, VitrineError):
            _log.error("landing the rows of %r failed", sequence.request_id[:64], exc_info=error)
            error = InternalError(f"landing the media rows failed: {type(error).__name__}")
        self._fail(sequence, error)

    def _account(self, chunks: list[Chunk], duration_s: float) -> None:
        self.num_steps += 1
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.is_prompt:
                self.num_prefill_tokens += chunk.length
                sequence.prefill_s += duration_s
            else:
                self.num_decode_tokens += chunk.length
            self._scheduler.computed(chunk)
            if sequence.rows and sequence.prompt is not None:
                sequence.release_landed_rows()
