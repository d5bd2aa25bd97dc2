"""Launches steps, and processes their results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vitrine_vlm.errors import InternalError, LeaseExpired, VitrineError
from vitrine_vlm.gpu_kernels.gpu_faults import is_lost
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass, StepOutput
from vitrine_vlm.llm_worker.engine.kv_rows import land_kv
from vitrine_vlm.llm_worker.engine.live_requests import LiveRequests
from vitrine_vlm.llm_worker.engine.logits_processing import LogitsProcessor
from vitrine_vlm.llm_worker.engine.pinned_copy import to_device
from vitrine_vlm.llm_worker.engine.prompt_logprobs import LogprobTensors
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.sampler import Choice, ChoiceOnHost, choose
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts, StepSize
from vitrine_vlm.types import EmbeddingRows

_log = logging.getLogger(__name__)
# How often a request's embeddings, or its KV, are requested again before it fails, with none landed in between: a
# request that waited for long may have lost all of them, of which each chunk shows only its own.
_MAX_NUM_LOST = 3
# Bytes of received KV that land in front of one step, beyond its first prompt: all that decode wait for them, 1.5 ms
# where they come over NVLink.
_MAX_LANDED_NBYTES = 512 << 20


@dataclass(frozen=True)
class KvLanding:
    """Received KV that is being copied into the cache. check: to be called once the copy is done."""

    chunk: Chunk
    check: Callable[[], None]


@dataclass
class InFlightStep:
    """A step that has been launched.

    prompt_logprobs: by chunk, on the way to the host like `choice`, which is of the next tokens. The choice is made by
        `StepExecutor.choose` where a grammar needs the tokens of the step in front for it, and None before.
    landings: of KV that is copied into the cache in front of the step.
    launched_at: by `time.perf_counter`.
    """

    chunks: list[Chunk]
    output: StepOutput
    prompt_logprobs: dict[Chunk, LogprobTensors]
    choice: ChoiceOnHost | None
    landings: list[KvLanding]
    launched_at: float


class StepExecutor:
    """Launches and processes steps. Belongs to the engine's thread.

    num_steps, num_prefill_tokens, num_decode_tokens: computed since the start.
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        scheduler: Scheduler,
        requests: LiveRequests,
        logits_processor: LogitsProcessor,
        costs: StepCosts,
        on_gpu_lost: Callable[[], object],
    ) -> None:
        """
        Args:
            costs: corrected by how long steps take.
            on_gpu_lost: called where a step has failed and the GPU can run no other.
        """
        self._forward_pass, self._scheduler, self._requests = forward_pass, scheduler, requests
        self._logits_processor = logits_processor
        self._costs = costs
        self._on_gpu_lost = on_gpu_lost
        self._landings: list[KvLanding] = []  # of the step that is launched next
        self._last_ended_at = 0.0
        self.num_steps = self.num_prefill_tokens = self.num_decode_tokens = 0

    @property
    def has_kv_to_land(self) -> bool:
        """Whether a running request has received KV whose landing was not launched."""
        remote = (request.remote_kv for request in self._scheduler.running)
        return any(each is not None and each.can_land for each in remote)

    def land_kv(self) -> None:
        """Launches the landing of received KV.

        Its requests decode from the step on that is launched next. `process` of that step checks what landed.
        """
        nbytes = 0
        for request in list(self._scheduler.running):
            remote = request.remote_kv
            if remote is None or remote.received is None or not remote.can_land:
                continue
            # Its prompt has just become known, and the scheduler will allocate blocks for all of it; or KV in front of
            # what has come was lost, and all will be requested again.
            if not request.prefix.is_matched or remote.first_token > request.num_computed:
                continue
            nbytes += remote.received.num_tokens * self._forward_pass.kv_cache.token_nbytes
            if self._landings and nbytes > _MAX_LANDED_NBYTES:
                break
            self._land_kv(request, remote.received, remote.first_token)

    def finish_landings(self) -> None:
        """Waits for landings behind which no step is launched, and processes them."""
        self._wait_for_landings(self._pop_landings())

    def launch(self, chunks: list[Chunk]) -> InFlightStep | None:
        """Launches a step; returns None where it failed, and so did its requests."""
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                output = self._forward_pass(chunks)
                needs_tokens = any(chunk.request.sampled.matcher is not None for chunk in output.sampling)
                choice = None if needs_tokens else self._choose(output)
                prompt_logprobs = {chunk: each.copy_to_host() for chunk, each in output.prompt_logprobs.items()}
                on_host = choice.copy_to_host() if choice is not None else None
        except Exception as error:
            self._step_failed(chunks, error)
            self.finish_landings()
            return None
        for chunk, reason in output.failed.items():
            self._landing_failed(chunk, reason)
        launched = [chunk for chunk in chunks if chunk not in output.failed] if output.failed else chunks
        for chunk in launched:
            chunk.request.launch(chunk.stop, chunk.samples)
        return InFlightStep(launched, output, prompt_logprobs, on_host, self._pop_landings(), begin)

    def choose(self, step: InFlightStep) -> bool:
        """Launches what chooses the next tokens, unless `launch` has; returns False where it failed.

        To be called once the step in front is processed: grammars allow a token by those before it. The device computes
        this step meanwhile.
        """
        if step.choice is not None:
            return True
        # What ended with the step in front has released what its logits are changed by.
        step.output = _current(step.output)
        try:
            with torch.inference_mode():
                step.choice = self._choose(step.output).copy_to_host()
        except Exception as error:
            self._step_failed([chunk for chunk in step.chunks if chunk.is_current], error)
            self._wait_for_landings(step.landings)
            return False
        return True

    def can_overlap(self, step: InFlightStep) -> bool:
        """Whether the next step can be launched before the tokens of this one are known."""
        return self._forward_pass.reads_token_pool or all(
            chunk.request.num_runnable <= chunk.stop for chunk in step.output.sampling
        )

    def process(self, step: InFlightStep, *, overlapped: bool) -> None:
        """Waits for a step's results, and processes those of chunks that are still current.

        Args:
            overlapped: whether the next step has been launched.
        """
        output = step.output
        assert step.choice is not None
        try:
            if overlapped or output.landed or step.landings or step.prompt_logprobs:
                step.choice.wait()
            lost = self._lost(output)
            next_tokens = step.choice.read() if output.sampling else []
        except Exception as error:
            chunks = (*step.chunks, *(each.chunk for each in step.landings))
            self._step_failed([chunk for chunk in chunks if chunk.is_current], error)
            return
        # It began once it was launched and the last had ended, so that no time counts for two steps.
        begin, now = max(step.launched_at, self._last_ended_at), time.perf_counter()
        self._last_ended_at = now
        self._process_landings(step.landings)
        if output.sampling:  # otherwise the step may still run
            self._costs.observe(StepSize.of(step.chunks), now - begin)
        computed = [chunk for chunk in step.chunks if chunk.is_current and not (lost and chunk in lost)]
        if step.prompt_logprobs:
            for chunk in computed:
                if chunk in step.prompt_logprobs:
                    chunk.request.append_prompt_logprobs(chunk.start, step.prompt_logprobs[chunk].read())
        self._commit(computed, now - begin)
        for chunk, checks in output.landed.items():
            if checks and chunk.is_current and chunk not in lost:
                chunk.request.embeddings_landed()
        for chunk, reason in lost.items():
            self._landing_failed(chunk, reason)
        for chunk, next_token in zip(output.sampling, next_tokens, strict=True):
            if chunk.is_current:
                chunk.request.token_arrived()
                self._requests.process_token(chunk.request, next_token)

    def _land_kv(self, request: RequestState, received: EmbeddingRows, first_token: int) -> None:
        chunk = Chunk(request, request.num_computed, request.num_prompt_tokens, samples=False, epoch=request.epoch)
        try:
            with torch.inference_mode():
                slots_T = request.table.slots[chunk.start : chunk.stop]
                land_kv(received, chunk.start - first_token, self._forward_pass.kv_cache.layers, slots_T)
                check = received.queue_check()
        except Exception as error:
            self._landing_failed(chunk, error)
            return
        request.launch_kv(chunk.stop)
        self._landings.append(KvLanding(chunk, check))

    def _pop_landings(self) -> list[KvLanding]:
        landings, self._landings = self._landings, []
        return landings

    def _wait_for_landings(self, landings: list[KvLanding]) -> None:
        """Waits for landings whose step cannot be processed, and processes them."""
        try:
            if landings and self._forward_pass.is_asynchronous:
                torch.cuda.current_stream(self._forward_pass.decoder.device).synchronize()
        except Exception as error:
            self._step_failed([each.chunk for each in landings if each.chunk.is_current], error)
            return
        self._process_landings(landings)

    def _process_landings(self, landings: list[KvLanding]) -> None:
        """Commits KV that has landed, unless its lease ended meanwhile."""
        for chunk, check in ((each.chunk, each.check) for each in landings if each.chunk.is_current):
            try:
                check()
            except Exception as error:
                self._landing_failed(chunk, error)
                continue
            chunk.request.kv_landed()
            self._scheduler.commit(chunk)

    def _lost(self, output: StepOutput) -> dict[Chunk, Exception]:
        """Chunks whose embeddings' lease ended before they had landed, with the error."""
        lost: dict[Chunk, Exception] = {}
        for chunk, checks in output.landed.items():
            try:
                for check in checks if chunk.is_current else ():
                    check()
            except Exception as error:  # of one request, and must not fail the others
                lost[chunk] = error
        return lost

    def _choose(self, output: StepOutput) -> Choice:
        """Chooses the next tokens of the chunks that end at their request's last one, and keeps them on the device."""
        params, uniform = [], []
        for chunk in output.sampling:
            sampled = chunk.request.sampled
            params.append(sampled.params)
            is_greedy = sampled.params.is_greedy
            uniform.append(0.0 if is_greedy else sampled.uniform(chunk.stop - chunk.request.num_prompt_tokens))
        logits_BV = self._logits_processor.process(output.sampling, output.logits_BV)
        choice = choose(logits_BV, params, uniform, output.logits_BV)
        self._forward_pass.token_pool.write(output.pool_rows_B, choice.token_ids_B)
        self._logits_processor.count(output.sampling, choice.token_ids_B)
        return choice

    def _step_failed(self, chunks: list[Chunk], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        if is_lost(self._forward_pass.decoder.device):
            self._on_gpu_lost()  # before the requests fail, so that they fail as retryable
        for chunk in chunks:
            self._requests.fail(chunk.request, InternalError(f"the step failed: {type(error).__name__}"))

    def _landing_failed(self, chunk: Chunk, error: Exception) -> None:
        """Discards a chunk: requests inputs again whose lease has expired; after any other error the request fails."""
        request = chunk.request
        if isinstance(error, LeaseExpired) and request.lose_inputs(chunk.start, chunk.stop) <= _MAX_NUM_LOST:
            _log.warning("request %r: %s", request.request_id[:64], error)
            return
        if not isinstance(error, VitrineError):
            _log.error("landing the embeddings or the KV of %r failed", request.request_id[:64], exc_info=error)
            error = InternalError(f"landing the embeddings or the KV failed: {type(error).__name__}")
        self._requests.fail(request, error)

    def _commit(self, chunks: list[Chunk], duration_s: float) -> None:
        self.num_steps += 1
        for chunk in chunks:
            if chunk.is_prompt:
                self.num_prefill_tokens += chunk.length
                chunk.request.timings.prefill_s += duration_s
            else:
                self.num_decode_tokens += chunk.length
            self._scheduler.commit(chunk)


def _current(output: StepOutput) -> StepOutput:
    """The output without chunks whose request has ended, or was rolled back, since they were launched."""
    rows = [row for row, chunk in enumerate(output.sampling) if chunk.is_current]
    if len(rows) == len(output.sampling):
        return output
    rows_B = to_device(output.logits_BV.device, rows)
    return replace(
        output,
        sampling=[output.sampling[row] for row in rows],
        logits_BV=output.logits_BV.index_select(0, rows_B),
        pool_rows_B=output.pool_rows_B.index_select(0, rows_B),
    )
