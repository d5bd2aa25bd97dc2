"""The engine's thread: takes requests from asyncio, runs step after step, hands tokens back."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from embedding_transport.errors import BadRequest, Overloaded, VitrineError, WorkerUnavailable
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.config import EngineConfig
from llm_worker.engine.forward_pass import ForwardPass
from llm_worker.engine.kv_rows import CachedKv
from llm_worker.engine.outbox import Outbox
from llm_worker.engine.prefix_hashes import extend_prefix_hashes
from llm_worker.engine.request import ExpandedPrompt, SamplingParams
from llm_worker.engine.request_handle import RequestHandle
from llm_worker.engine.sampler import NextToken
from llm_worker.engine.scheduler import Scheduler
from llm_worker.engine.sequence import Sequence
from llm_worker.engine.steps import Step, Steps
from service_runtime.supervisor import Supervisor


@dataclass
class EngineStats:
    """Requests and KV blocks now; steps, tokens, preemptions and evicted blocks since the start.

    running: or on the way to it, while media are encoded; waiting: for memory.
    queued_prefill_tokens: of prompts, not computed yet. kv_blocks_kept: held by nobody, but with content that may be
    used again. num_cached_tokens: of prompts, not computed because their KV was there.
    """

    running: int
    waiting: int
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


class Engine:
    """Runs the model for many requests. Everything below `call` runs on the engine's own thread."""

    def __init__(
        self, forward_pass: ForwardPass, config: EngineConfig, on_gpu_lost: Callable[[], object] = lambda: None
    ) -> None:
        """
        Args:
            forward_pass: made with the same config.
            on_gpu_lost: called on the engine's thread where the GPU will run no other step after one that failed.
        """
        self.outbox = Outbox()
        self._forward_pass = forward_pass
        self._config = config
        self._kv_cache = forward_pass.kv_cache
        self._scheduler = Scheduler(
            self._kv_cache,
            config.max_num_batched_tokens,
            config.max_num_seqs,
            config.max_model_len,
            config.prefix_cache,
            config.mixed_step_tokens,
        )
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._arrivals = itertools.count()
        self._lock = threading.RLock()  # over _num_live and _thread_ended
        self._num_live = 0
        self._closing = False
        self._thread_ended = False
        self._steps = Steps(forward_pass, self._scheduler, self._end, self.on_fail, on_gpu_lost)

    @property
    def vocab_size(self) -> int:
        return self._forward_pass.decoder.config.vocab_size

    def start(self, supervisor: Supervisor) -> None:
        """Begins to run steps, on a thread that the supervisor owns."""
        self._supervisor = supervisor
        self._thread = supervisor.start_thread("engine", self.run)

    def close(self) -> None:
        """Fails what still runs, releases all rows and ends the thread."""
        self._supervisor.expect_end(self._thread)
        self.call(self._on_close)
        self._thread.join()

    def fail_all(self, error: VitrineError) -> None:
        """Fails every request that is running or waiting; on the engine's thread, or once that has ended."""
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self.on_fail(sequence, error)

    def submit(
        self,
        request_id: str,
        prefix_token_ids: list[int],
        sampling: SamplingParams,
        send_rows: Callable[[list[int]], None],
        send_kv: Callable[[int], None] | None = None,
        keep_kv: bool = False,
        prompt: ExpandedPrompt | None = None,
    ) -> RequestHandle:
        """Takes a request in. Its prefix, the text in front of the first media item, is prefilled at once.

        Args:
            send_rows: called on the caller's event loop when rows of these items are needed that are not coming: they
                were not announced, or they are lost. Then `set_rows` is due, or `fail`.
            send_kv: where the prompt is computed elsewhere, called likewise once there is room for its KV, and when it
                is lost, with the first token whose KV is missing. Then `set_prompt`, `set_first_token` and `set_kv` are
                due, or `fail`.
            keep_kv: the blocks of a request that got its last token are kept until `cancel`.
            prompt: the whole one, where it is known by now: `set_prompt` is not due then.

        Raises:
            PromptTooLong: the prefix leaves no room by itself.
            Overloaded: too many requests are waiting.
        """
        self._scheduler.check_room(len(prefix_token_ids))
        handle = RequestHandle(self, request_id)
        sequence = Sequence(
            request_id,
            next(self._arrivals),
            list(prefix_token_ids),
            sampling,
            handle.deliver,
            handle.on_loop(send_rows),
            handle.on_loop(send_kv) if send_kv is not None else None,
            keep_kv=keep_kv,
        )
        handle.sequence = sequence
        with self._lock:
            self.check_room()
            self._num_live += 1
        self.call(self._on_submit, sequence, prompt)
        return handle

    def check_room(self) -> None:
        """
        Raises:
            Overloaded: as many requests are running or waiting as may.
        """
        limit = self._config.max_num_seqs + self._config.max_waiting
        if self._num_live >= limit:
            raise Overloaded(f"{self._num_live} requests are running or waiting, the limit is {limit}: try again later")

    def missing_items(self, prompt: ExpandedPrompt) -> set[int]:
        """Media items of the prompt whose KV is not in the cache now; it may be evicted any moment. From any thread."""
        if not self._config.prefix_cache:
            return prompt.items_from(0)
        block_size = self._config.block_size
        hashes: list[bytes] = []
        extend_prefix_hashes(hashes, prompt.token_ids, prompt, block_size, (len(prompt.token_ids) - 1) // block_size)
        return prompt.items_from(len(self._kv_cache.match_prefix(hashes)) * block_size)

    def kv_of(self, sequence: Sequence) -> CachedKv:
        """See `RequestHandle.kv`."""
        assert sequence.finished and sequence.keep_kv
        return CachedKv(self._kv_cache.layers, sequence.blocks.slots[: sequence.num_prompt_tokens])

    def stats(self) -> EngineStats:
        waiting = list(self._scheduler.waiting)
        awaiting_media = sum(each.waits_for_media for each in waiting)
        return EngineStats(
            running=len(self._scheduler.running) + awaiting_media,
            waiting=len(waiting) - awaiting_media,
            queued_prefill_tokens=self._scheduler.num_queued_prefill_tokens,
            kv_blocks_used=self._kv_cache.num_blocks - self._kv_cache.num_free,
            kv_blocks_kept=self._kv_cache.num_cached_free,
            kv_blocks_total=self._kv_cache.num_blocks,
            kv_blocks_evicted=self._kv_cache.num_evicted,
            num_steps=self._steps.num_steps,
            num_prefill_tokens=self._steps.num_prefill_tokens,
            num_decode_tokens=self._steps.num_decode_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_preempted=self._scheduler.num_preempted,
        )

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Has the engine's thread call `function` before its next step; after its end, calls it here."""
        with self._lock:
            if not self._thread_ended:
                self._calls.put(lambda: function(*arguments))
            else:
                function(*arguments)
                self.outbox.send()

    def run(self) -> None:
        """The engine's thread, until `close`."""
        steps = self._steps
        step: Step | None = None  # that has started and is to be followed before it is through
        try:
            while not self._closing:
                chunks = self._scheduler.schedule()
                for sequence in self._scheduler.running:
                    if missing := sequence.missing_items():
                        sequence.request_rows(missing)
                    sequence.ask_for_kv()
                if not (chunks and self._forward_pass.is_asynchronous):
                    self.outbox.send()
                landed = steps.land_kv()
                following = steps.start(chunks) if chunks else None
                # What the step before made is told while the GPU computes: listeners would delay what starts its work.
                self.outbox.send()
                if step is not None:
                    steps.finish(step, followed=following is not None)
                    self.outbox.send()
                had_work = bool(chunks or landed or step)
                step = following
                if step is not None and not (steps.can_be_followed(step) and self._forward_pass.until_nearly_done()):
                    steps.finish(step, followed=False)
                    step = None
                if had_work:
                    self._run_calls()
                else:
                    self._calls.get()()
        finally:  # whatever ended the loop: nobody may wait for a thread that is gone
            with self._lock:
                self._thread_ended = True
                self._on_close()
                self._run_calls()
                self.outbox.send()

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    # Calls from the handles.

    def _on_submit(self, sequence: Sequence, prompt: ExpandedPrompt | None) -> None:
        sequence.row = self._forward_pass.token_pool.allocate()
        self._scheduler.add(sequence)
        if prompt is not None:
            self.on_prompt(sequence, prompt, set())
        if self._closing:
            self._on_close()

    def on_prompt(self, sequence: Sequence, prompt: ExpandedPrompt, coming: set[int]) -> None:
        if sequence.finished:
            return
        try:
            if not prompt.token_ids:
                raise BadRequest("the prompt is empty")
            sequence.set_prompt(prompt)
            sequence.coming = coming - sequence.rows.keys()
            self._scheduler.check_length(sequence)
        except VitrineError as error:
            self.on_fail(sequence, error)

    def on_rows(self, sequence: Sequence, item_index: int, rows: EmbeddingRows) -> None:
        sequence.coming.discard(item_index)
        if sequence.finished or item_index in sequence.rows:
            rows.release()
            return
        sequence.rows[item_index] = rows
        if sequence.matched:  # and perhaps already computed, by an earlier request
            sequence.release_landed_rows()

    def on_first_token(self, sequence: Sequence, first: NextToken, prefill_ms: float, num_cached_tokens: int) -> None:
        if sequence.finished or sequence.num_generated:
            return
        sequence.prefill_s = prefill_ms / 1000
        sequence.num_cached = num_cached_tokens
        self._steps.take_token(sequence, first)

    def on_kv(self, sequence: Sequence, rows: EmbeddingRows) -> None:
        sequence.kv_coming = False
        if sequence.finished or sequence.is_decoding or sequence.kv is not None:
            rows.release()
        else:
            sequence.kv = rows

    def on_cancel(self, sequence: Sequence) -> None:
        if not sequence.finished:
            self._end(sequence)
        else:
            self._kv_cache.release(sequence.blocks)
        sequence.forget_listener()

    def on_fail(self, sequence: Sequence, error: VitrineError) -> None:
        if not sequence.finished:
            self._end(sequence)
            sequence.deliver(error, sequence.timings())

    def _on_close(self) -> None:
        self._closing = True
        self.fail_all(WorkerUnavailable("the worker's engine has ended: send the request to another one"))

    def _end(self, sequence: Sequence, keep_kv: bool = False) -> None:
        self._scheduler.remove(sequence, keep_kv)
        self._forward_pass.token_pool.release(sequence.row)
        with self._lock:
            self._num_live -= 1
