"""Decides which tokens of which requests are computed in the next step.

Requests are admitted by arrival. A running one decodes one token a step; the rest of the step's budget goes to prefill
chunks. A request whose embeddings are late is computed as far as they have come, and no other waits for it.

A request has KV blocks for the tokens it knows. Where a running one needs another block and none is free, the running
request that came last is preempted: its blocks are released, and it waits to be computed again. So the first always
proceeds. What is still in the prefix cache by then, its own or of another request, is not computed again.

A prompt that is computed elsewhere gets its blocks before its KV is requested, and none of it is computed here until
its KV has landed in them; generated tokens are computed here as always.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable

from vitrine_vlm.errors import PromptTooLong
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request_state import RequestState, RequestStatus
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals


class Scheduler:
    """
    waiting, running: requests in order of arrival. max_model_len: longest prompt plus answer that memory holds, tokens.
    num_preempted: how often a request was preempted. num_cached_tokens: prompt tokens whose KV was in the cache. Both
    since the start.
    """

    def __init__(
        self,
        kv_cache: KvCache,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        goals: StepGoals,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            max_num_batched_tokens, max_num_seqs: limits of one step.
            max_model_len: longest prompt plus answer, tokens.
            goals: bounds the prompt tokens of steps that also decode.
            prefix_cache: whether KV is used again by requests with the same beginning.
            clock: seconds, of the same clock as `RequestTimings`.
        """
        self.num_preempted = 0
        self.num_cached_tokens = 0
        self._prefix_cache = prefix_cache
        self._kv_cache = kv_cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._goals = goals
        self._clock = clock
        self._max_num_seqs = max_num_seqs
        self.max_model_len = min(max_model_len, kv_cache.num_blocks * kv_cache.block_size)
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []

    @property
    def num_queued_prefill_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        decoding = RequestStatus.DECODING
        running = (each for each in self.running if each.status is not decoding)
        return _num_uncomputed(self.waiting) + _num_uncomputed(running)

    @property
    def num_computing(self) -> int:
        """Running requests that wait neither for embeddings nor for KV of a prefill worker."""
        computing = (RequestStatus.DECODING, RequestStatus.PREFILLING)
        return sum(each.status in computing for each in self.running)

    def add(self, request: RequestState) -> None:
        insort(self.waiting, request, key=lambda each: each.key)

    def remove(self, request: RequestState) -> None:
        """Removes a request that has ended; its blocks stay allocated."""
        for requests in (self.waiting, self.running):
            if request in requests:
                requests.remove(request)

    def limit_length(self, request: RequestState) -> None:
        """Sets the maximum length of a request, once its prompt is known.

        Raises:
            PromptTooLong: see `check_context_length`.
        """
        num_prompt = request.num_prompt_tokens
        self.check_context_length(num_prompt)
        wanted = request.sampled.params.max_tokens
        longest = self.max_model_len - num_prompt
        request.limit_length(num_prompt + (longest if wanted is None else min(wanted, longest)))

    def check_context_length(self, num_tokens: int) -> None:
        """Refuses a prompt that is too long. Safe on any thread.

        Raises:
            PromptTooLong: the context does not hold a prompt of this many tokens and one generated token.
        """
        if num_tokens >= self.max_model_len:
            # It begins as OpenAI's own does: clients know this error by these words.
            raise PromptTooLong(
                f"Input tokens exceed the configured limit of {self.max_model_len} tokens, the answer included: the "
                f"prompt has {num_tokens}. Shorten the text, send fewer or smaller images, or start the worker with a "
                "larger --max-model-len"
            )

    def schedule(self) -> list[Chunk]:
        """Returns the next step's chunks; none where nothing can be computed now."""
        index = 0
        while index < len(self.running):  # preemption may shorten the list
            self._append_slots(self.running[index])
            index += 1
        self._admit()
        now = self._clock()
        decoding: list[RequestState] = []
        prefilling: list[RequestState] = []
        for request in self.running:
            num_left = request.num_runnable - request.num_computed
            if num_left > 0:
                # Generated tokens whose KV was lost are computed again in chunks, as prompts are.
                if num_left == 1 and request.status is RequestStatus.DECODING:
                    decoding.append(request)
                else:
                    request.mark_ready(now)
                    prefilling.append(request)
        budget = self._max_num_batched_tokens
        if decoding and prefilling:
            budget = min(budget, len(decoding) + self._goals.num_prompt_tokens(decoding, prefilling, now))
        chunks: list[Chunk] = []
        for request in (*decoding, *prefilling):
            if len(chunks) == self._max_num_seqs:
                break
            start = request.num_computed
            stop = min(request.num_runnable, start + budget)
            if stop > start:
                samples = request.complete and stop == request.num_tokens
                chunks.append(Chunk(request, start, stop, samples, request.epoch))
                budget -= stop - start
        return chunks

    def commit(self, chunk: Chunk) -> None:
        """Records that the chunk is computed, or its KV has landed; registers its full blocks for other requests."""
        request, block_size = chunk.request, self._kv_cache.block_size
        request.commit(chunk.stop)
        first, stop = chunk.start // block_size, chunk.stop // block_size
        if self._prefix_cache and stop > first:
            for index, content_hash in enumerate(request.hashes(block_size, stop)[first:], first):
                self._kv_cache.register_hash(request.table, index, content_hash)

    def _append_slots(self, request: RequestState) -> None:
        """Allocates slots for all tokens of a running request; preempts later requests where none are free."""
        if request.complete and not request.prefix.is_matched:
            self._match_further(request)
        while not self._kv_cache.append_slots(request.table, request.num_to_hold):
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return

    def _preempt(self, request: RequestState) -> None:
        self.num_preempted += 1
        self.running.remove(request)
        self._kv_cache.release(request.table)
        request.preempt()
        self.add(request)

    def _admit(self) -> None:
        for request in list(self.waiting):
            if request.status is RequestStatus.WAITING_FOR_PROMPT:
                continue
            if not self._allocate(request):
                # Later requests may be admitted before one of which only the text in front of its media is known, but
                # not if its prompt is computed elsewhere: that prompt becomes known only once it is admitted.
                if not request.complete and request.remote_kv is None:
                    continue
                return
            self.waiting.remove(request)
            insort(self.running, request, key=lambda each: each.key)

    def _allocate(self, request: RequestState) -> bool:
        """Allocates a request's first blocks, if that leaves a free block for each running request."""
        matched = self._match_prefix(request)
        if not self._kv_cache.allocate(request.table, matched, request.num_tokens, len(self.running)):
            return False
        self._reuse_prefix(request, matched)
        request.admit()
        return True

    def _match_further(self, request: RequestState) -> None:
        """Matches a request again, whose media are known only now: the cache may have more of it than is computed."""
        matched = self._match_prefix(request)
        if len(matched) * self._kv_cache.block_size <= request.num_computed:
            self._reuse_prefix(request, [])
            return
        self._kv_cache.release(request.table)
        # Allocates the matched blocks only, which need no free ones.
        allocated = self._kv_cache.allocate(request.table, matched, len(matched) * self._kv_cache.block_size)
        assert allocated
        self._reuse_prefix(request, matched)
        request.admit()

    def _match_prefix(self, request: RequestState) -> list[int]:
        """Blocks in the cache with the request's first tokens; the last token is always computed, to sample from."""
        # Log-probabilities of the prompt need its hidden states, which are not cached.
        if not self._prefix_cache or request.is_scored:
            return []
        block_size = self._kv_cache.block_size
        return self._kv_cache.match_prefix(request.hashes(block_size, (request.num_tokens - 1) // block_size))

    def _reuse_prefix(self, request: RequestState, matched: list[int]) -> None:
        self.num_cached_tokens += request.reuse_prefix(len(matched) * self._kv_cache.block_size)


def _num_uncomputed(requests: Iterable[RequestState]) -> int:
    return sum(max(0, each.num_prompt_tokens - each.num_computed) for each in requests)
