"""Which tokens of which sequences run in the next step.

Requests are taken in by arrival. Whoever is in decodes one token a step; what is left of the step's budget goes to
prefill chunks. A sequence whose media rows are late takes part with what it has, or not at all: nobody waits for it.

A sequence reserves KV for its prompt and everything it may generate before it computes its prompt, so nobody in the
running set can be stuck for memory. Only the text in front of the first media item runs before that; its blocks are
given up again if the reservation does not succeed.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from embedding_transport.errors import PromptTooLong
from llm_worker.engine.kv_cache import KvCache
from llm_worker.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a sequence run in this step; `samples` where they end at its last token."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool

    @property
    def length(self) -> int:
        return self.stop - self.start


class Scheduler:
    def __init__(self, kv_cache: KvCache, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        self._kv_cache = kv_cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._max_model_len = min(max_model_len, kv_cache.num_blocks * kv_cache.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda each: each.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished, failed or cancelled sequence out and frees what it holds."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._kv_cache.free(sequence.blocks)
        sequence.release_rows()
        sequence.finished = True

    def check_length(self, sequence: Sequence) -> None:
        """Fixes how long a sequence may become, now that its prompt is known.

        Raises:
            PromptTooLong: there is no room for the prompt and one more token.
        """
        num_prompt = sequence.num_prompt_tokens
        if num_prompt >= self._max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens, the context holds {self._max_model_len} including the answer: "
                "shorten the text, send fewer or smaller images, or start the worker with a larger --max-model-len"
            )
        wanted = sequence.sampling.max_tokens
        room = self._max_model_len - num_prompt
        sequence.max_total_tokens = num_prompt + (room if wanted is None else min(wanted, room))

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty where nothing can run now."""
        self._reserve_for_running()
        self._admit()
        chunks: list[Chunk] = []
        budget = self._max_num_batched_tokens
        decoding = [each for each in self.running if each.num_generated > 0]
        prefilling = [each for each in self.running if each.num_generated == 0]
        for sequence in (*decoding, *prefilling):
            if len(chunks) == self._max_num_seqs:
                break
            start = sequence.num_computed
            stop = min(sequence.num_runnable, start + budget)
            if stop > start:
                samples = sequence.prompt is not None and stop == len(sequence.token_ids)
                chunks.append(Chunk(sequence, start, stop, samples))
                budget -= stop - start
        return chunks

    def _reserve_for_running(self) -> None:
        """Sequences that ran ahead on their text and know their prompt by now get their whole reservation, or leave."""
        for sequence in [each for each in self.running if each.prompt is not None and not each.reserved]:
            if not self._reserve(sequence):
                self.running.remove(sequence)
                self._kv_cache.free(sequence.blocks)
                sequence.num_computed = 0
                self.add(sequence)

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if sequence.prompt is None:
                if not sequence.token_ids or not self._kv_cache.grow(sequence.blocks, len(sequence.token_ids)):
                    continue  # nothing to run ahead on, or no room to: later ones may have their whole prompt
            elif not self._reserve(sequence):
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda each: each.arrival)

    def _reserve(self, sequence: Sequence) -> bool:
        sequence.reserved = self._kv_cache.grow(sequence.blocks, sequence.max_total_tokens)
        return sequence.reserved
