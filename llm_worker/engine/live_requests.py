"""The requests that the engine holds, and the effects of commands and tokens on them."""

from __future__ import annotations

from copy import copy

from vitrine_vlm.errors import BadRequest, InternalError, VitrineError
from vitrine_vlm.llm_worker.engine.capacity import Capacity
from vitrine_vlm.llm_worker.engine.commands import (
    Cancel,
    Command,
    Fail,
    ResetPrefixCache,
    SetEmbeddings,
    SetFirstToken,
    SetKv,
    SetPrompt,
    Submit,
    discard,
)
from vitrine_vlm.llm_worker.engine.events import EmbeddingsNeeded, KvNeeded, RequestFailed, TokenSampled
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv
from vitrine_vlm.llm_worker.engine.logits_processing import LogitsProcessor
from vitrine_vlm.llm_worker.engine.outbox import Outbox
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, TokenOutput
from vitrine_vlm.llm_worker.engine.request_parts import CachedPrefix, RemoteKv, SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState, RequestStatus
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool


class LiveRequests:
    """Holds a request from `Submit` to its end, or to `Cancel` if it keeps its KV. Belongs to the engine's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache: KvCache,
        token_pool: TokenPool,
        logits_processor: LogitsProcessor,
        outbox: Outbox,
        capacity: Capacity,
    ) -> None:
        self._scheduler, self._kv_cache, self._token_pool = scheduler, kv_cache, token_pool
        self._logits_processor = logits_processor
        self._outbox, self._capacity = outbox, capacity
        self._requests: dict[int, RequestState] = {}

    def execute(self, command: Command) -> None:
        """Executes a command; releases what it carries where its request has ended."""
        if isinstance(command, Submit):
            self._submit(command)
            return
        if isinstance(command, ResetPrefixCache):
            self._kv_cache.reset_prefixes()
            return
        request = self._requests.get(command.key)
        if request is None:
            discard(command, InternalError("the request has ended"))
            return
        match command:
            case SetPrompt(prompt=prompt, announced=announced):
                self._set_prompt(request, prompt, announced)
            case SetEmbeddings(item_index=item_index, embeddings=embeddings):
                request.receive_embeddings(item_index, embeddings)
            case SetFirstToken():
                self._set_first_token(request, command)
            case SetKv(kv=kv, received_at=received_at):
                request.receive_kv(kv, received_at)
            case Fail(error=error):
                self.fail(request, error)
            case Cancel():
                self._cancel(request)

    def request_inputs(self) -> None:
        """Requests the inputs that running requests need and that were neither announced nor requested."""
        for request in self._scheduler.running:
            if request.status is RequestStatus.DECODING:
                continue
            if request.remote_kv is not None:
                if request.remote_kv.request_missing(request.num_computed):
                    self._outbox.put(request.key, KvNeeded(request.num_computed))
            elif missing := request.media.request_missing(request.prompt, request.num_computed):
                self._outbox.put(request.key, EmbeddingsNeeded(missing))

    def process_token(self, request: RequestState, next_token: NextToken) -> None:
        """Appends the request's next token, which may be its last."""
        token_id = next_token.token_id
        if token_id is None:
            self.fail(request, InternalError("the model's output is not a number: there is no next token to draw"))
            return
        try:
            is_last = request.append_token(token_id)
        except VitrineError as error:  # of its grammar
            self.fail(request, error)
            return
        finish_reason = None
        if is_last:
            finish_reason = "stop"
        elif len(request.token_ids) >= request.max_total_tokens:
            finish_reason = "length"
        kv = None
        if finish_reason is not None and request.keep_kv:
            kv = CachedKv(self._kv_cache.layers, request.table.slots[: request.num_prompt_tokens])
        output = TokenOutput(token_id, next_token.logprobs, finish_reason)
        prompt_logprobs = None
        if request.prompt_logprobs and len(request.token_ids) == request.num_prompt_tokens + 1:
            prompt_logprobs = request.prompt_logprobs
        self._outbox.put(request.key, TokenSampled(output, request.timings_now(), kv, prompt_logprobs))
        if finish_reason is not None:
            self._end(request, keep_kv=request.keep_kv)

    def fail(self, request: RequestState, error: VitrineError) -> None:
        """Ends a request, unless it has ended."""
        if request.status is not RequestStatus.FINISHED:
            self._outbox.put(request.key, RequestFailed(error, request.timings_now()))
            self._end(request)

    def fail_all(self, error: VitrineError) -> None:
        """Ends every request. All events are put before anything is released, as a release may fail after a fault."""
        running = [each for each in self._requests.values() if each.status is not RequestStatus.FINISHED]
        for request in running:
            # A copy each: one exception must not be raised in several tasks.
            self._outbox.put(request.key, RequestFailed(copy(error), request.timings_now()))
        for request in running:
            self._end(request)

    def _submit(self, command: Submit) -> None:
        request = RequestState(
            command.key,
            command.request_id,
            list(command.prefix_token_ids),
            SampledTokens(command.sampling, command.matcher),
            RemoteKv() if command.has_remote_kv else None,
            command.keep_kv,
            self._token_pool.allocate(),
            prefix=CachedPrefix(scope=command.scope),
        )
        self._requests[command.key] = request
        self._outbox.subscribe(command.key, command.subscriber)
        self._scheduler.add(request)
        if command.prompt is not None:
            self._set_prompt(request, command.prompt, frozenset())

    def _set_prompt(self, request: RequestState, prompt: ExpandedPrompt, announced: frozenset[int]) -> None:
        if request.status is RequestStatus.FINISHED:
            return
        try:
            if not prompt.token_ids:
                raise BadRequest("the prompt is empty")
            request.set_prompt(prompt, announced)
            self._scheduler.limit_length(request)
        except VitrineError as error:
            self.fail(request, error)

    def _set_first_token(self, request: RequestState, command: SetFirstToken) -> None:
        if request.status is RequestStatus.FINISHED or request.num_tokens > request.num_prompt_tokens:
            return
        request.prefilled_elsewhere(command.prefill_ms / 1000, command.num_cached_tokens)
        self.process_token(request, command.first)

    def _cancel(self, request: RequestState) -> None:
        if request.status is not RequestStatus.FINISHED:
            self._end(request)
        else:
            self._release_blocks(request)

    def _end(self, request: RequestState, keep_kv: bool = False) -> None:
        self._scheduler.remove(request)
        self._token_pool.release(request.pool_row)
        self._logits_processor.release(request.key)
        self._capacity.release()
        self._outbox.unsubscribe(request.key)
        request.finish()
        if not keep_kv:
            self._release_blocks(request)

    def _release_blocks(self, request: RequestState) -> None:
        self._kv_cache.release(request.table)
        del self._requests[request.key]
