"""The state of one request in the engine: its status, its prompt as far as it is known, and what is computed of it.

    WAITING_FOR_PROMPT -> WAITING -> PREFILLING <-> WAITING_FOR_MEDIA -> DECODING -> FINISHED
                             ^           or WAITING_FOR_KV                  |
                             +------------------- preempt ------------------+

Any status may become FINISHED, by the last token, an error or a cancellation. `roll_back` leads from DECODING to the
status that the remaining tokens allow.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from vitrine_vlm.errors import InternalError
from vitrine_vlm.llm_worker.engine.prefix_hashes import extend_prefix_hashes
from vitrine_vlm.llm_worker.engine.request import EngineTimings, ExpandedPrompt, MediaSpan, TokenLogprobs
from vitrine_vlm.llm_worker.engine.request_parts import (
    CachedPrefix,
    MediaInputs,
    RemoteKv,
    RequestTimings,
    SampledTokens,
)
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable
from vitrine_vlm.types import EmbeddingRows


class RequestStatus(Enum):
    """What a request does or waits for. It has KV blocks from PREFILLING on, and none while it is queued."""

    WAITING_FOR_PROMPT = auto()
    """Queued; nothing can be computed before the sizes of its media are known."""
    WAITING = auto()
    """Queued for KV blocks."""
    PREFILLING = auto()
    """Tokens of its prompt can be computed now."""
    WAITING_FOR_MEDIA = auto()
    """Everything in front of media whose embeddings, or sizes, are not here is computed."""
    WAITING_FOR_KV = auto()
    """A prefill worker computes the prompt."""
    DECODING = auto()
    """The whole prompt is computed, or will be when the steps in flight are."""
    FINISHED = auto()
    """The request has ended; its blocks may be kept."""


_NO_POSITIONS = torch.empty((3, 0), dtype=torch.int64)
_QUEUED = (RequestStatus.WAITING_FOR_PROMPT, RequestStatus.WAITING)


@dataclass(eq=False, slots=True)
class RequestState:
    """Belongs to the engine's thread. Only the methods below write it; steps add to its timings.

    key: identifies the request within the engine; keys are in order of arrival. pool_row: its row of the token pool.
    token_ids: the text in front of the first media item, or the whole prompt and the generated tokens that the host
        knows.
    keep_kv: its blocks are kept after its last token. remote_kv: None where the prompt is computed here.
    prompt: the text in front of the first media item, until the prompt is `complete`.
    table: its KV blocks. num_computed: tokens whose KV is in them, or will be when the steps in flight are computed;
    num_committed: tokens whose steps are computed; num_ready: tokens that could be computed by now.
    epoch: how often it was rolled back; results of steps that were launched in an earlier epoch are discarded.
    max_total_tokens: limit of prompt and answer, set once the prompt is complete.
    prompt_logprobs: of the prompt's tokens from the second on, as far as they are computed; see `is_scored`.
    """

    key: int
    request_id: str
    token_ids: list[int]
    sampled: SampledTokens
    remote_kv: RemoteKv | None = None
    keep_kv: bool = False
    pool_row: int = 0
    status: RequestStatus = field(init=False)
    prompt: ExpandedPrompt = field(init=False)
    num_prompt_tokens: int = field(init=False)
    complete: bool = False
    media: MediaInputs = field(default_factory=MediaInputs)
    prefix: CachedPrefix = field(default_factory=CachedPrefix)
    timings: RequestTimings = field(default_factory=RequestTimings)
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    num_committed: int = 0
    num_ready: int = 0
    epoch: int = 0
    num_preempted: int = 0
    max_total_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = length = len(self.token_ids)
        # Requests with media begin without text, mostly, and torch takes as long for no numbers as for many.
        positions_3N = torch.arange(length).expand(3, -1) if length else _NO_POSITIONS
        self.prompt = ExpandedPrompt(list(self.token_ids), positions_3N, length)
        can_begin = length > 0 or self.remote_kv is not None
        self.status = RequestStatus.WAITING if can_begin else RequestStatus.WAITING_FOR_PROMPT

    @property
    def num_tokens(self) -> int:
        """All tokens, those included that steps in flight sample."""
        return len(self.token_ids) + self.sampled.num_in_flight

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of its prompt's tokens are wanted and not all computed yet."""
        if self.sampled.params.prompt_logprobs is None:
            return False
        return not self.complete or len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def num_to_hold(self) -> int:
        """Tokens that need a slot in the KV cache; an answer's last token is not computed."""
        if self.status is RequestStatus.DECODING:
            return min(self.num_tokens, self.max_total_tokens - 1)
        return self.num_tokens

    @property
    def num_runnable(self) -> int:
        """The tokens that would be computed after the next step, if it had no limits."""
        if self.status is RequestStatus.DECODING:
            return self.num_to_hold
        return self.num_ready if self.status is RequestStatus.PREFILLING else self.num_computed

    # The prompt and its inputs.

    def set_prompt(self, prompt: ExpandedPrompt, announced: Iterable[int] = ()) -> None:
        """Sets the whole prompt.

        Args:
            announced: media items whose embeddings will come without being requested.

        Raises:
            InternalError: the prompt does not begin with the tokens that were submitted.
        """
        if prompt.token_ids[: len(self.token_ids)] != self.token_ids:
            raise InternalError(f"the prompt of {self.request_id} does not begin with the text that was prefilled")
        self.prompt, self.num_prompt_tokens, self.complete = prompt, len(prompt.token_ids), True
        self.token_ids = list(prompt.token_ids)
        self.prefix.is_matched = False
        self.media.requested_items = set(announced) - self.media.received.keys()
        if self.status in _QUEUED:
            self.status = RequestStatus.WAITING
        else:
            self._resume()

    def limit_length(self, max_total_tokens: int) -> None:
        """Sets the limit of prompt and answer, tokens."""
        self.max_total_tokens = max_total_tokens

    def receive_embeddings(self, item_index: int, embeddings: EmbeddingRows) -> None:
        """Keeps a media item's embeddings, and releases them as soon as they are not needed any more."""
        self.media.requested_items.discard(item_index)
        if self.status is RequestStatus.FINISHED or item_index in self.media.received:
            embeddings.release()
            return
        self.media.received[item_index] = embeddings
        if self.prefix.is_matched:  # its KV may be that of an earlier request
            self._release_landed()
        if self.status in (RequestStatus.PREFILLING, RequestStatus.WAITING_FOR_MEDIA):
            self._resume()

    def receive_kv(self, kv: EmbeddingRows, received_at: float) -> None:
        """Keeps the prompt's KV, or releases it where it is not needed any more."""
        remote = self.remote_kv
        if remote is not None:
            remote.is_requested = False
        is_needed = self.status not in (RequestStatus.DECODING, RequestStatus.FINISHED)
        if remote is not None and remote.received is None and is_needed:
            remote.received, remote.received_at = kv, received_at
        else:
            kv.release()

    # Changes by the scheduler and by steps.

    def admit(self) -> None:
        """Begins to run: its first blocks are allocated."""
        self._resume()

    def reuse_prefix(self, num_tokens: int) -> int:
        """Marks the tokens as computed whose KV is in blocks of earlier requests, its first ones.

        Returns:
            The number of them that count as cached; a preempted request finds mostly its own KV.
        """
        self.num_computed = max(self.num_computed, num_tokens)
        self.num_committed = max(self.num_committed, num_tokens)
        num_new = 0
        if num_tokens > self.prefix.num_tokens and not self.num_preempted:
            num_new = num_tokens - self.prefix.num_tokens
            self.prefix.num_tokens = num_tokens
        if self.complete:
            self.prefix.is_matched = True
            self._release_landed()
        return num_new

    def mark_ready(self, now: float) -> None:
        """Records when its whole prompt, media included, could first be computed."""
        if self.timings.ready_at is None and self.complete and self.num_runnable == self.num_tokens:
            self.timings.ready_at = now

    def launch(self, stop: int, samples: bool) -> None:
        """Records that a step in flight computes it up to token `stop`, and with `samples` samples the next token."""
        self.num_computed = stop
        self.sampled.num_in_flight += samples
        if self.status is not RequestStatus.DECODING:
            self._resume()

    def launch_kv(self, stop: int) -> None:
        """Records that the next step copies received KV into the cache, up to token `stop`."""
        assert self.remote_kv is not None
        self.remote_kv.is_landing = True
        self.launch(stop, samples=False)

    def kv_landed(self) -> None:
        """Records that the KV is in the cache, and releases what was received."""
        assert self.remote_kv is not None
        self.timings.land_s += time.perf_counter() - self.remote_kv.received_at
        self.remote_kv.release()

    def commit(self, stop: int) -> None:
        """Records that the step is computed which computes it up to token `stop`."""
        self.num_committed = stop
        if self.media.received:
            self._release_landed()

    def append_prompt_logprobs(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Appends those of the tokens behind token `start`; some are known where the prompt is computed again."""
        self.prompt_logprobs.extend(logprobs[max(len(self.prompt_logprobs) - start, 0) :])

    def embeddings_landed(self) -> None:
        """Records that embeddings have landed: earlier losses do not count any more."""
        self.media.num_lost = 0

    def append_token(self, token_id: int) -> bool:
        """Appends the next token, which the host has received; returns whether none follows, whatever the limits.

        Raises:
            VitrineError: see `GrammarMatcher.accept`.
        """
        self.token_ids.append(token_id)
        self.timings.token_sampled()
        if token_id in self.sampled.params.stop_token_ids:
            return True
        matcher = self.sampled.matcher
        return matcher is not None and matcher.accept(token_id)

    def token_arrived(self) -> None:
        """Records that the host receives a token that was in flight."""
        self.sampled.num_in_flight -= 1

    def prefilled_elsewhere(self, prefill_s: float, num_cached_tokens: int) -> None:
        """Records a prefill worker's computation of the prompt: its duration, and the tokens from its cache."""
        self.timings.prefill_s = prefill_s
        self.prefix.num_tokens = num_cached_tokens

    def roll_back(self, num_tokens: int, lost_items: Iterable[int] = ()) -> None:
        """Discards the KV of everything behind these tokens, and the results of steps in flight.

        Args:
            lost_items: media items whose embeddings were lost, which are released.
        """
        self.epoch += 1
        self.sampled.num_in_flight = 0
        self.num_computed = min(self.num_computed, num_tokens)
        self.num_committed = min(self.num_committed, num_tokens)
        self.media.release(set(lost_items) & self.media.received.keys())
        if self.remote_kv is not None:
            self.remote_kv.is_landing = False
        self._resume()

    def lose_inputs(self, start: int, stop: int) -> int:
        """Releases the embeddings, or the KV, of tokens [start, stop), which were lost while they landed.

        Returns:
            How often inputs were lost since some were last landed.
        """
        if self.remote_kv is not None:
            self.remote_kv.release()
            self.remote_kv.num_lost += 1
            self.roll_back(start)
            return self.remote_kv.num_lost
        self.media.num_lost += 1
        self.roll_back(start, {span.item_index for span in self.spans_in(start, stop)})
        return self.media.num_lost

    def preempt(self) -> None:
        """Puts it back into the queue after its blocks were released; received embeddings are kept."""
        self.roll_back(0)
        self.num_preempted += 1
        self.prefix.is_matched = False
        self.status = RequestStatus.WAITING

    def finish(self) -> None:
        """Ends it: releases the inputs it received. Results of steps in flight are discarded."""
        self.epoch += 1
        self.status = RequestStatus.FINISHED
        self.media.release(self.media.received)
        if self.remote_kv is not None:
            self.remote_kv.release()

    # Read by steps.

    def hashes(self, block_size: int, num_blocks: int) -> Sequence[bytes]:
        """Hashes of the first blocks, `num_blocks` at most; see `prefix_hashes.py`."""
        prefix = self.prefix
        extend_prefix_hashes(prefix.hashes, self.token_ids, self.prompt, block_size, num_blocks, prefix.scope)
        return prefix.hashes[:num_blocks]

    def spans_in(self, start: int, stop: int) -> list[MediaSpan]:
        """Media spans that overlap tokens [start, stop)."""
        return self.prompt.spans_in(start, stop) if self.prompt.spans and start < self.num_prompt_tokens else []

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """M-RoPE positions of tokens [start, stop), [3, stop - start] int64."""
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return self.prompt.positions_3N[:, start:stop]
        first = self.generated_position(max(start, num_prompt))
        generated = torch.arange(first, first + stop - max(start, num_prompt)).expand(3, -1)
        if start >= num_prompt:
            return generated
        return torch.cat([self.prompt.positions_3N[:, start:], generated], dim=1)

    def generated_position(self, index: int) -> int:
        """M-RoPE position of the generated token at `index`, the same along all three axes."""
        return self.prompt.next_position + index - self.num_prompt_tokens

    def timings_now(self) -> EngineTimings:
        return self.timings.snapshot(self.prefix.num_tokens)

    def _resume(self) -> None:
        """Sets the status and `num_ready` of a request that has blocks, from what is computed and what has come."""
        if self.complete and self.num_computed >= self.num_prompt_tokens:
            self.status = RequestStatus.DECODING
            if self.remote_kv is not None and not self.remote_kv.is_landing:
                self.remote_kv.release()
        elif self.remote_kv is not None:
            self.status = RequestStatus.WAITING_FOR_KV
        else:
            if self.complete:
                missing = self.media.first_missing(self.prompt, self.num_computed)
                self.num_ready = missing if missing is not None else self.num_tokens
            else:
                # Without the last token: if the prompt ends with it, it has to be computed to sample from.
                self.num_ready = max(len(self.token_ids) - 1, 0)
            can_run = self.num_ready > self.num_computed
            self.status = RequestStatus.PREFILLING if can_run else RequestStatus.WAITING_FOR_MEDIA

    def _release_landed(self) -> None:
        """Releases the embeddings of every item whose last token is committed."""
        if self.complete and self.media.received:
            self.media.release(self.media.received.keys() - self.prompt.items_from(self.num_committed))
