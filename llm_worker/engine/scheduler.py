"""Which tokens of which sequences run in the next step.

Requests are taken in by arrival. Whoever is in decodes one token a step; what is left of the step's budget goes to
prefill chunks. A sequence whose media rows are late takes part with what it has, or not at all: nobody waits for it.

A sequence holds KV blocks for the tokens it knows. Where a running one needs another block and there is none, the one
that came last gives all of its own up and waits to be computed anew: the first can always go on. What the cache still
knows by then, or knew of another request's equal beginning, is not computed again.

A prompt that is computed elsewhere gets its blocks before it is asked for, and nothing of it runs here until its KV has
landed in them; what was generated is computed here as ever.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from embedding_transport.errors import PromptTooLong
from llm_worker.engine.kv_cache import KvCache
from llm_worker.engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence run in this step; `samples` where they end at its last token.

    attempt: of the sequence, when the chunk was made.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    attempt: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_prompt(self) -> bool:
        """Of what was there before anything was generated."""
        return self.sequence.prompt is None or self.start < self.sequence.num_prompt_tokens

    @property
    def counts(self) -> bool:
        """Whether its sequence still runs and has not lost what the chunk builds on."""
        return not self.sequence.finished and self.attempt == self.sequence.attempt


class Scheduler:
    """
    num_preempted: how often a sequence had to give its blocks up; num_cached_tokens: tokens of prompts that were not
    computed because their KV was there; both since the start.
    """

    def __init__(
        self,
        kv_cache: KvCache,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        prefix_cache: bool = True,
        mixed_step_tokens: int | None = None,
    ) -> None:
        """
        Args:
            max_num_batched_tokens, max_num_seqs: in one step.
            mixed_step_tokens: in a step that also decodes, so that decoding does not wait for long prompts.
            max_model_len: longest prompt plus answer, tokens.
            prefix_cache: KV of one request is used again by others that begin alike.
        """
        self.num_preempted = 0
        self.num_cached_tokens = 0
        self._prefix_cache = prefix_cache
        self._kv_cache = kv_cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._mixed_step_tokens = min(mixed_step_tokens or max_num_batched_tokens, max_num_batched_tokens)
        self._max_num_seqs = max_num_seqs
        self._max_model_len = min(max_model_len, kv_cache.num_blocks * kv_cache.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def num_queued_prefill_tokens(self) -> int:
        """Tokens of prompts that are not computed yet; from any thread."""
        sequences = [*self.waiting, *self.running]
        return sum(max(0, each.num_prompt_tokens - each.num_computed) for each in sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda each: each.arrival)

    def remove(self, sequence: Sequence, keep_kv: bool = False) -> None:
        """Takes a finished, failed or cancelled sequence out and frees what it holds; `keep_kv`: but its blocks."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if not keep_kv:
            self._kv_cache.release(sequence.blocks)
        sequence.release_rows(sequence.rows)
        sequence.release_kv()
        sequence.finished = True

    def check_length(self, sequence: Sequence) -> None:
        """Fixes how long a sequence may become, now that its prompt is known.

        Raises:
            PromptTooLong: there is no room for the prompt and one more token.
        """
        num_prompt = sequence.num_prompt_tokens
        self.check_room(num_prompt)
        wanted = sequence.sampling.max_tokens
        room = self._max_model_len - num_prompt
        sequence.max_total_tokens = num_prompt + (room if wanted is None else min(wanted, room))

    def check_room(self, num_tokens: int) -> None:
        """From any thread.

        Raises:
            PromptTooLong: there is no room for a prompt of so many tokens and one more.
        """
        if num_tokens >= self._max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, the context holds {self._max_model_len} including the answer: "
                "shorten the text, send fewer or smaller images, or start the worker with a larger --max-model-len"
            )

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty where nothing can run now."""
        index = 0
        while index < len(self.running):  # whose last ones may have to go on the way
            self._make_room(self.running[index])
            index += 1
        self._admit()
        chunks: list[Chunk] = []
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            num_left = sequence.num_runnable - sequence.num_computed
            if num_left > 0:
                # What was lost of an answer is computed anew as prompts are.
                (decoding if sequence.is_decoding and num_left == 1 else prefilling).append(sequence)
        # Prompts get some of every step, however many decode, while there is a place for another sequence.
        budget = self._max_num_batched_tokens
        if decoding:
            least = max(1, self._mixed_step_tokens // 4)
            budget = min(budget, max(self._mixed_step_tokens, len(decoding) + least))
        for sequence in (*decoding, *prefilling):
            if len(chunks) == self._max_num_seqs:
                break
            start = sequence.num_computed
            stop = min(sequence.num_runnable, start + budget)
            if stop > start:
                samples = sequence.prompt is not None and stop == sequence.num_tokens
                chunks.append(Chunk(sequence, start, stop, samples, sequence.attempt))
                budget -= stop - start
        return chunks

    def started(self, chunk: Chunk) -> None:
        """The chunk is being computed: later ones of its sequence can follow."""
        chunk.sequence.num_computed = chunk.stop

    def computed(self, chunk: Chunk) -> None:
        """The chunk has run, or its KV was landed; its full blocks can be used by others from now on."""
        sequence, block_size = chunk.sequence, self._kv_cache.block_size
        sequence.num_settled = chunk.stop
        first, stop = chunk.start // block_size, chunk.stop // block_size
        if self._prefix_cache and stop > first:
            for index, content_hash in enumerate(sequence.hashes(block_size, stop)[first:], first):
                self._kv_cache.register_hash(sequence.blocks, index, content_hash)

    def _make_room(self, sequence: Sequence) -> None:
        """Blocks for every token that a running sequence knows, at the cost of those that came after it."""
        if sequence.prompt is not None and not sequence.matched:
            self._match_further(sequence)
        while not self._kv_cache.append_slots(sequence.blocks, sequence.num_to_hold):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self.running.remove(sequence)
        self._kv_cache.release(sequence.blocks)
        sequence.give_up()
        self.add(sequence)

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            # A prompt that is computed elsewhere becomes known only after this, one whose media are encoded anyway.
            if sequence.prompt is None and sequence.request_kv is None:
                if sequence.waits_for_media or not self._begin(sequence):
                    continue  # nothing to run ahead on, or no room to: later ones may have their whole prompt
            elif not self._begin(sequence):
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda each: each.arrival)

    def _begin(self, sequence: Sequence) -> bool:
        """Gives a sequence its first blocks, if that leaves a block to each of those that run."""
        matched = self._matched(sequence)
        if not self._kv_cache.allocate(sequence.blocks, matched, len(sequence.token_ids), len(self.running)):
            return False
        self._use(sequence, matched)
        return True

    def _match_further(self, sequence: Sequence) -> None:
        """A sequence that ran ahead on its text knows its media now, and the cache may know them, too."""
        matched = self._matched(sequence)
        if len(matched) * self._kv_cache.block_size > sequence.num_computed:
            self._kv_cache.release(sequence.blocks)
            # What it held covers what it gets, less the blocks that it shares.
            allocated = self._kv_cache.allocate(sequence.blocks, matched, len(matched) * self._kv_cache.block_size)
            assert allocated
            self._use(sequence, matched)
        else:
            self._use(sequence, [])

    def _matched(self, sequence: Sequence) -> list[int]:
        """Blocks in the cache with the sequence's first tokens; the last token has to run, to be sampled from."""
        if not self._prefix_cache:
            return []
        block_size = self._kv_cache.block_size
        return self._kv_cache.match_prefix(sequence.hashes(block_size, (len(sequence.token_ids) - 1) // block_size))

    def _use(self, sequence: Sequence, matched: list[int]) -> None:
        num_cached = len(matched) * self._kv_cache.block_size
        sequence.num_computed = max(sequence.num_computed, num_cached)
        sequence.num_settled = max(sequence.num_settled, num_cached)
        # What a preempted sequence finds is mostly its own.
        if num_cached > sequence.num_cached and not sequence.preempted:
            self.num_cached_tokens += num_cached - sequence.num_cached
            sequence.num_cached = num_cached
        if sequence.prompt is not None:
            sequence.matched = True
            sequence.release_landed_rows()
