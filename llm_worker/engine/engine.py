"""The engine's thread: commands in, one step after the other, events out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from vitrine_vlm.errors import VitrineError, WorkerUnavailable
from vitrine_vlm.llm_worker.engine.capacity import Capacity
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.commands import CommandQueue, ResetPrefixCache, Submit, discard
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.live_requests import LiveRequests
from vitrine_vlm.llm_worker.engine.logits_processing import LogitsProcessor
from vitrine_vlm.llm_worker.engine.outbox import Outbox
from vitrine_vlm.llm_worker.engine.prefix_hashes import extend_prefix_hashes
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle, RequestSubscriber
from vitrine_vlm.llm_worker.engine.request_state import RequestStatus
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.llm_worker.engine.step_executor import InFlightStep, StepExecutor
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.service_runtime.supervisor import Supervisor


@dataclass(slots=True)
class EngineStats:
    """Requests and KV blocks now; steps, tokens, preemptions and evicted blocks since the start.

    running: requests that hold KV blocks, or wait for their media's sizes; waiting: requests that wait for KV blocks.
    num_computing: of the running ones those that do not wait for another service. max_num_seqs: see `EngineConfig`.
    queued_prefill_tokens: prompt tokens that are not computed yet. kv_blocks_kept: without users, with content that can
    be used again. num_cached_tokens: prompt tokens whose KV was in the cache. num_itl_missed, num_ttft_missed: see
    `StepGoals`; step_cost_correction: see `StepCosts`.
    """

    running: int
    waiting: int
    num_computing: int
    max_num_seqs: int
    queued_prefill_tokens: int
    kv_blocks_used: int
    kv_blocks_kept: int
    kv_blocks_total: int
    kv_blocks_evicted: int
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_cached_tokens: int
    num_preempted: int
    num_itl_missed: int
    num_ttft_missed: int
    step_cost_correction: float

    @property
    def load(self) -> float:
        """The wanted part of sequences in a step or of KV blocks, whichever is larger; above 1 requests have to wait.

        Requests that wait for encoders or prefill workers count for the KV blocks that they hold alone: what they wait
        for is scaled by itself. Waiting requests count as if they held as many blocks as running ones do.
        """
        if not self.kv_blocks_total:
            return 0.0
        kv_blocks = self.kv_blocks_used * (1 + self.waiting / max(1, self.running))
        return max((self.num_computing + self.waiting) / self.max_num_seqs, kv_blocks / self.kv_blocks_total)


class Engine:
    """Runs the model for many requests. `run` belongs to the engine's thread; other public methods are safe on any."""

    def __init__(
        self,
        forward_pass: ForwardPass,
        config: EngineConfig,
        on_gpu_lost: Callable[[], object] = lambda: None,
        costs: StepCosts | None = None,
    ) -> None:
        """
        Args:
            forward_pass: made with the same config.
            on_gpu_lost: called on the engine's thread where a step has failed and the GPU can run no other.
            costs: as `measure_step_costs` found them; where they are unknown, steps are bounded by tokens alone.
        """
        costs = costs if costs is not None else StepCosts.unknown()
        self._forward_pass = forward_pass
        self._config = config
        self._kv_cache = forward_pass.kv_cache
        self._costs = costs
        max_mixed_tokens = min(config.mixed_step_tokens or config.max_num_batched_tokens, config.max_num_batched_tokens)
        self._goals = StepGoals(costs, config.target_itl_s, config.target_ttft_s, max_mixed_tokens)
        self._scheduler = Scheduler(
            self._kv_cache,
            config.max_num_batched_tokens,
            config.max_num_seqs,
            config.max_model_len,
            self._goals,
            config.prefix_cache,
        )
        self._capacity = Capacity(config.max_num_seqs + config.max_waiting)
        self._keys = itertools.count()
        self._commands = CommandQueue()
        self._outbox = Outbox()
        token_pool = forward_pass.token_pool
        logits_processor = LogitsProcessor(self.vocab_size, token_pool)
        self._requests = LiveRequests(
            self._scheduler, self._kv_cache, token_pool, logits_processor, self._outbox, self._capacity
        )
        self._executor = StepExecutor(
            forward_pass, self._scheduler, self._requests, logits_processor, costs, on_gpu_lost
        )
        self._in_flight: InFlightStep | None = None
        self._is_idle = False
        self._stats = self._count()

    @property
    def vocab_size(self) -> int:
        return self._forward_pass.decoder.config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._config.max_model_len

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that the context holds, with one generated token behind it."""
        return self._scheduler.max_model_len - 1

    def start(self, supervisor: Supervisor) -> None:
        """Starts the engine's thread, which the supervisor owns."""
        self._supervisor = supervisor
        self._thread = supervisor.start_thread("engine", self.run)

    def close(self) -> None:
        """Fails the requests in flight, releases what they hold and ends the thread."""
        self._supervisor.expect_end(self._thread)
        self.fail_all(WorkerUnavailable("the worker is shutting down: send the request to another one"))
        self._thread.join()

    def fail_all(self, error: VitrineError) -> None:
        """Fails all requests in flight with this error, refuses later ones with it, and ends `run`.

        Only the first call has an effect; `run` makes one itself when it fails.
        """
        self._commands.close(error)

    def submit(
        self,
        request_id: str,
        prefix_token_ids: list[int],
        sampling: SamplingParams,
        send_embeddings: Callable[[list[int]], None],
        send_kv: Callable[[int], None] | None = None,
        keep_kv: bool = False,
        prompt: ExpandedPrompt | None = None,
        matcher: GrammarMatcher | None = None,
        scope: bytes = b"",
    ) -> RequestHandle:
        """Adds a request. Its prefix, the text in front of the first media item, is prefilled at once.

        Args:
            send_embeddings: called on the caller's event loop when embeddings of these items are needed that were not
                announced, or were lost. The caller then has to call `set_embeddings`, or `fail`.
            send_kv: where the prompt is computed elsewhere, called likewise once there are blocks for its KV, and when
                the KV was lost, with the first token whose KV is missing. The caller then has to call `set_prompt`,
                `set_first_token` and `set_kv`, or `fail`.
            keep_kv: the blocks of a request that got its last token are kept until `cancel`.
            prompt: the whole prompt, where it is known already; then `set_prompt` is not called.
            matcher: of the sampling's grammar, for this answer alone.
            scope: the digest of the request's cache scope: only requests of an equal one use its KV again.

        Raises:
            PromptTooLong: the prefix alone exceeds the context length.
            Overloaded: too many requests are waiting.
        """
        self._scheduler.check_context_length(len(prefix_token_ids))
        self._capacity.acquire()
        key = next(self._keys)
        handle = RequestHandle(key, request_id, self._commands)
        subscriber = RequestSubscriber(handle, send_embeddings, send_kv)
        has_remote_kv = send_kv is not None
        command = Submit(
            key, request_id, prefix_token_ids, sampling, subscriber, has_remote_kv, keep_kv, prompt, matcher, scope
        )
        if not self._commands.put(command):
            self._capacity.release()
        return handle

    def check_capacity(self, num_requests: int = 1) -> None:
        """Refuses further requests where the limit would be passed.

        Raises:
            Overloaded: with these, more requests would be running or waiting than are allowed.
        """
        self._capacity.check(num_requests)

    def missing_items(self, prompt: ExpandedPrompt, scope: bytes = b"") -> set[int]:
        """Media items of the prompt whose KV is not in the cache now. The KV of others may be evicted at any moment.

        Args:
            scope: as for `submit`.
        """
        if not self._config.prefix_cache:
            return prompt.items_from(0)
        block_size = self._config.block_size
        hashes: list[bytes] = []
        num_blocks = (len(prompt.token_ids) - 1) // block_size
        extend_prefix_hashes(hashes, prompt.token_ids, prompt, block_size, num_blocks, scope)
        return prompt.items_from(len(self._kv_cache.match_prefix(hashes)) * block_size)

    def reset_prefix_cache(self) -> None:
        """Has later requests compute their whole prompts. Blocks in use stay so, and are not matched any more."""
        self._commands.put(ResetPrefixCache())

    def stats(self) -> EngineStats:
        """The statistics that the engine's thread published last, after a step."""
        return self._stats

    def run(self) -> None:
        """The thread's target; returns after `fail_all`.

        Raises:
            Exception: a fault of the loop itself. All requests have failed, and later ones are refused. An error in a
                step is not raised, it fails that step's requests.
        """
        try:
            while self._commands.error is None:
                self._receive()
                self._executor.land_kv()
                chunks = self._schedule()
                launched = self._launch(chunks)
                self._is_idle = not (chunks or self._in_flight or self._executor.has_kv_to_land)
                self._process_last(launched)
            self._process_last(None)  # before anything that it reads is released
        except BaseException as error:
            self.fail_all(WorkerUnavailable(f"the worker's engine has ended: {type(error).__name__}"))
            raise
        finally:
            self._end()

    def _receive(self) -> None:
        """Executes the commands in the queue, and waits for one where there is nothing else to do."""
        for command in self._commands.wait() if self._is_idle else self._commands.pop_all():
            self._requests.execute(command)

    def _schedule(self) -> list[Chunk]:
        chunks = self._scheduler.schedule()
        self._requests.request_inputs()
        return chunks

    def _launch(self, chunks: list[Chunk]) -> InFlightStep | None:
        """Launches the next step, while the last may be in flight."""
        if not (chunks and self._forward_pass.is_asynchronous):
            self._publish_events()
        if chunks:
            launched = self._executor.launch(chunks)
        else:
            launched = None
            self._executor.finish_landings()
        # New events are sent while the GPU computes: before a launch, the event loops' work would delay it.
        self._publish_events()
        return launched

    def _process_last(self, launched: InFlightStep | None) -> None:
        """Processes the last step's results, and those of the one just launched unless the next one can overlap it."""
        last, self._in_flight = self._in_flight, launched
        if last is not None:
            self._executor.process(last, overlapped=launched is not None)
        if launched is not None and not self._executor.choose(launched):
            self._in_flight = launched = None
        self._publish()
        if launched is not None and not self._can_overlap(launched):
            self._executor.process(launched, overlapped=False)
            self._in_flight = None

    def _can_overlap(self, launched: InFlightStep) -> bool:
        """Whether the next step is to be launched before this one ends; waits until it is nearly done."""
        return self._executor.can_overlap(launched) and self._forward_pass.wait_until_nearly_done()

    def _publish(self) -> None:
        """Publishes current statistics, and then the new events, so that no event precedes its statistics."""
        self._stats = self._count()
        self._outbox.send()

    def _publish_events(self) -> None:
        """Publishes likewise, if there are any events."""
        if not self._outbox.is_empty:
            self._publish()

    def _end(self) -> None:
        """Fails all requests and discards all commands, so that nothing waits for a thread that has ended."""
        error = self._commands.error
        assert error is not None
        for command in self._commands.pop_all():
            discard(command, error)
        try:
            self._requests.fail_all(error)
            self._stats = self._count()
        finally:
            self._outbox.send()

    def _count(self) -> EngineStats:
        scheduler, kv_cache, executor = self._scheduler, self._kv_cache, self._executor
        waiting_for_prompt = RequestStatus.WAITING_FOR_PROMPT
        num_waiting_for_prompt = sum(each.status is waiting_for_prompt for each in scheduler.waiting)
        return EngineStats(
            running=len(scheduler.running) + num_waiting_for_prompt,
            waiting=len(scheduler.waiting) - num_waiting_for_prompt,
            num_computing=scheduler.num_computing,
            max_num_seqs=self._config.max_num_seqs,
            queued_prefill_tokens=scheduler.num_queued_prefill_tokens,
            kv_blocks_used=kv_cache.num_blocks - kv_cache.num_free,
            kv_blocks_kept=kv_cache.num_cached_free,
            kv_blocks_total=kv_cache.num_blocks,
            kv_blocks_evicted=kv_cache.num_evicted,
            num_steps=executor.num_steps,
            num_prefill_tokens=executor.num_prefill_tokens,
            num_decode_tokens=executor.num_decode_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_preempted=scheduler.num_preempted,
            num_itl_missed=self._goals.num_itl_missed,
            num_ttft_missed=self._goals.num_ttft_missed,
            step_cost_correction=self._costs.correction,
        )
