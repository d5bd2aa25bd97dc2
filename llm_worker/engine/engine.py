"""The step loop: takes requests from asyncio, schedules, lands, runs the decoder, samples, hands tokens back."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from embedding_transport.errors import BadRequest, InternalError, LeaseExpired, Overloaded, VitrineError
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.config import EngineConfig
from llm_worker.engine.forward_pass import ForwardPass, StepOutput
from llm_worker.engine.kv_rows import CachedKv, land_kv
from llm_worker.engine.outbox import Outbox
from llm_worker.engine.prefix_hashes import extend_prefix_hashes
from llm_worker.engine.request import ExpandedPrompt, SamplingParams, TokenOutput
from llm_worker.engine.request_handle import RequestHandle
from llm_worker.engine.sampler import NextToken, sample, skip_draw
from llm_worker.engine.scheduler import Chunk, Scheduler
from llm_worker.engine.sequence import Sequence

_log = logging.getLogger(__name__)
# How often a request's media rows are asked for anew before it fails.
_MAX_LOST_ROWS = 3


@dataclass
class EngineStats:
    """Requests and KV blocks now; steps, tokens, preemptions and evicted blocks since the start.

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


@dataclass(frozen=True)
class _Step:
    """That has started, with the chunks that are being computed, on `begin` of the clock."""

    chunks: list[Chunk]
    output: StepOutput
    begin: float


class Engine:
    """Runs the model for many requests. Everything below `call` runs on the engine's own thread."""

    def __init__(self, forward_pass: ForwardPass, config: EngineConfig) -> None:
        """
        Args:
            forward_pass: made with the same config.
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
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def vocab_size(self) -> int:
        return self._forward_pass.decoder.config.vocab_size

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Fails what still runs, releases all rows and ends the thread."""
        self.call(self._on_close)
        self._thread.join()

    def submit(
        self,
        request_id: str,
        prefix_token_ids: list[int],
        sampling: SamplingParams,
        send_rows: Callable[[list[int]], None],
        send_kv: Callable[[], None] | None = None,
        keep_kv: bool = False,
    ) -> RequestHandle:
        """Takes a request in. Its prefix, the text in front of the first media item, is prefilled at once.

        Args:
            send_rows: called on the caller's event loop when rows of these items are needed that are not coming: they
                were not announced, or they are lost. Then `set_rows` is due, or `fail`.
            send_kv: where the prompt is computed elsewhere, called likewise once there is room for its KV, and when it
                is lost. Then `set_prompt`, `set_first_token` and `set_kv` are due, or `fail`.
            keep_kv: the blocks of a request that got its last token are kept until `cancel`.

        Raises:
            Overloaded: too many requests are waiting.
        """
        limit = self._config.max_num_seqs + self._config.max_waiting
        handle = RequestHandle(self, request_id, send_rows, send_kv)
        sequence = Sequence(
            request_id,
            next(self._arrivals),
            list(prefix_token_ids),
            sampling,
            handle.deliver,
            handle.request_rows,
            handle.request_kv if send_kv is not None else None,
            keep_kv=keep_kv,
        )
        handle.sequence = sequence
        with self._lock:
            if self._num_live >= limit:
                raise Overloaded(
                    f"{self._num_live} requests are running or waiting, the limit is {limit}: try again later"
                )
            self._num_live += 1
        self.call(self._on_submit, sequence)
        return handle

    def missing_items(self, prompt: ExpandedPrompt) -> set[int]:
        """Media items of the prompt whose KV is not in the cache now; it may be evicted any moment. From any thread."""
        if not self._config.prefix_cache:
            return prompt.items_from(0)
        block_size = self._config.block_size
        hashes: list[bytes] = []
        extend_prefix_hashes(hashes, prompt.token_ids, prompt, block_size, (len(prompt.token_ids) - 1) // block_size)
        return prompt.items_from(len(self._kv_cache.match(hashes)) * block_size)

    def kv_of(self, sequence: Sequence) -> CachedKv:
        """See `RequestHandle.kv`."""
        assert sequence.finished and sequence.keep_kv
        return CachedKv(self._kv_cache.layers, sequence.blocks.slots[: sequence.num_prompt_tokens])

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            queued_prefill_tokens=self._scheduler.num_queued_prefill_tokens,
            kv_blocks_used=self._kv_cache.num_blocks - self._kv_cache.num_free,
            kv_blocks_kept=self._kv_cache.num_kept,
            kv_blocks_total=self._kv_cache.num_blocks,
            kv_blocks_evicted=self._kv_cache.num_evicted,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
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

    def _run(self) -> None:
        step: _Step | None = None  # that has started and is to be followed before it is through
        try:
            while not self._closing:
                chunks = self._scheduler.schedule()
                for sequence in self._scheduler.running:
                    if missing := sequence.missing_items():
                        sequence.request_rows(missing)
                    sequence.ask_for_kv()
                if not (chunks and self._forward_pass.only_starts):
                    self.outbox.send()
                landed = step is None and self._land_kv()
                following = self._start(chunks) if chunks else None
                # What the step before made is told while the GPU computes: listeners would delay what starts its work.
                self.outbox.send()
                if step is not None:
                    self._finish(step, followed=following is not None)
                    self.outbox.send()
                had_work = bool(chunks or landed or step)
                step = following
                if step is not None and not (self._can_be_followed(step) and self._forward_pass.until_nearly_done()):
                    self._finish(step, followed=False)
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

    def _on_submit(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
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
        skip_draw(sequence.sampling, sequence.generator)
        self._emit(sequence, first)

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
            self._kv_cache.free(sequence.blocks)

    def on_fail(self, sequence: Sequence, error: VitrineError) -> None:
        if not sequence.finished:
            self._end(sequence)
            sequence.deliver(error, sequence.timings())

    def _on_close(self) -> None:
        self._closing = True
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self.on_fail(sequence, InternalError("the worker is shutting down"))

    def _end(self, sequence: Sequence, keep_kv: bool = False) -> None:
        self._scheduler.remove(sequence, keep_kv)
        with self._lock:
            self._num_live -= 1

    # One step.

    def _land_kv(self) -> bool:
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
                land_kv(sequence.kv, chunk.start, self._kv_cache.layers, slots_T)
        except Exception as error:
            self._landing_failed(chunk, error)
            return True
        self._scheduler.started(chunk)
        self._scheduler.computed(chunk)
        sequence.release_kv()
        sequence.land_s += time.perf_counter() - begin
        return True

    def _start(self, chunks: list[Chunk]) -> _Step | None:
        """None where it failed."""
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                output = self._forward_pass(chunks)
        except Exception as error:
            self._step_failed(chunks, error)
            return None
        for chunk in chunks:
            if chunk in output.failed:
                self._landing_failed(chunk, output.failed[chunk])
            else:
                self._scheduler.started(chunk)
        return _Step([chunk for chunk in chunks if chunk not in output.failed], output, begin)

    def _can_be_followed(self, step: _Step) -> bool:
        """Whether what comes next does not depend on the tokens that it makes."""
        return all(chunk.sequence.ends_with_next_token for chunk in step.output.sampling)

    def _finish(self, step: _Step, *, followed: bool) -> None:
        """Waits for its result, and takes it in as far as it still counts.

        Args:
            followed: the next step has started.
        """
        output = step.output
        try:
            if followed or output.landed:
                output.wait()
            lost = self._lost(output)
            sampling = [chunk for chunk in output.sampling if chunk.counts and chunk not in lost]
            beside = self._forward_pass.beside_the_next_step() if followed else nullcontext()
            with torch.inference_mode(), beside:
                next_tokens = self._sample(output, sampling)
        except Exception as error:
            self._step_failed([chunk for chunk in step.chunks if chunk.counts], error)
            return
        computed = [chunk for chunk in step.chunks if chunk.counts and chunk not in lost]
        self._account(computed, time.perf_counter() - step.begin)
        for chunk, reason in lost.items():
            self._landing_failed(chunk, reason)
        for chunk, next_token in zip(sampling, next_tokens, strict=True):
            self._emit(chunk.sequence, next_token)

    def _lost(self, output: StepOutput) -> dict[Chunk, Exception]:
        """Chunks whose media rows were taken back before, or while, they were landed."""
        lost: dict[Chunk, Exception] = {}
        for chunk, all_rows in output.landed.items():
            try:
                for rows in all_rows if chunk.counts else ():
                    rows.check()
            except Exception as error:  # of one request, and nothing to the others
                lost[chunk] = error
        return lost

    def _sample(self, output: StepOutput, chunks: list[Chunk]) -> list[NextToken]:
        """The next tokens of these chunks, which end at their sequence's last token."""
        if not chunks:
            return []
        logits_BV = output.logits_BV
        if chunks != output.sampling:
            logits_BV = logits_BV[[output.sampling.index(chunk) for chunk in chunks]]
        sequences = [chunk.sequence for chunk in chunks]
        return sample(logits_BV, [each.sampling for each in sequences], [each.generator for each in sequences])

    def _step_failed(self, chunks: list[Chunk], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        for chunk in chunks:
            self.on_fail(chunk.sequence, InternalError(f"the step failed: {type(error).__name__}"))

    def _landing_failed(self, chunk: Chunk, error: Exception) -> None:
        """The chunk does not count. Rows that were lost on the way are asked for again, else the request fails."""
        sequence = chunk.sequence
        sequence.go_back(chunk.start)
        if isinstance(error, LeaseExpired) and sequence.num_lost_rows < _MAX_LOST_ROWS:
            _log.warning("request %s: %s", sequence.request_id, error)
            sequence.num_lost_rows += 1
            if sequence.request_kv is not None:
                sequence.release_kv()
            else:
                sequence.release_rows({span.item_index for span in sequence.spans_in(chunk.start, chunk.stop)})
            return
        if not isinstance(error, VitrineError):
            _log.error("landing the rows of %s failed", sequence.request_id, exc_info=error)
            error = InternalError(f"landing the media rows failed: {type(error).__name__}")
        self.on_fail(sequence, error)

    def _account(self, chunks: list[Chunk], duration_s: float) -> None:
        self._num_steps += 1
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.is_prompt:
                self._num_prefill_tokens += chunk.length
                sequence.prefill_s += duration_s
            else:
                self._num_decode_tokens += chunk.length
            self._scheduler.computed(chunk)
            if sequence.rows and sequence.prompt is not None:
                sequence.release_landed_rows()

    def _emit(self, sequence: Sequence, next_token: NextToken) -> None:
        token_id = next_token.token_id
        if token_id is None:
            self.on_fail(sequence, InternalError("the model's output is not a number: there is no next token to draw"))
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
