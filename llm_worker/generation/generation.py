"""Runs a request from start to end: prompt, prefill, tokens, text. The frontends are thin layers over this."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from vitrine_vlm.errors import BadRequest, TooManyItems
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, TokenOutput
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.sampling_checks import check_sampling
from vitrine_vlm.llm_worker.generation.events import (
    Delta,
    Finished,
    FirstToken,
    GenerationEvent,
    GenerationRequest,
    Observe,
    PromptLogprobs,
    Started,
)
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext, RequestInputs
from vitrine_vlm.llm_worker.generation.stages import Stage, stage_timings, stages
from vitrine_vlm.llm_worker.generation.stop_strings import StopStrings, check_stop_strings
from vitrine_vlm.llm_worker.generation.tokenization import Tokenization
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan, plan_placeholders
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.service_runtime.api_keys import take_media
from vitrine_vlm.service_runtime.logs import harmless, set_request_id
from vitrine_vlm.service_runtime.traces import past_span
from vitrine_vlm.types import Layout

MakeInputs: TypeAlias = Callable[[PromptContext, GenerationRequest], RequestInputs]
_MAX_RECENT = 50
# Tokens of a prompt that are checked in less time than a thread takes.
_SHORT_PROMPT = 4096


def _ignore(event: GenerationEvent, answer: int = 0) -> None:
    """Observes nothing."""


@dataclass(frozen=True)
class RecentRequest:
    """A finished request, for the live page.

    finished_at: seconds since the epoch; elapsed_ms: from its arrival to its last token.
    """

    request_id: str
    finished_at: float
    elapsed_ms: float
    num_items: int
    finished: Finished
    stages: list[Stage]


class Generator:
    """Runs requests on the engine.

    recent: the last requests that finished, oldest first. tokenization: of prompts; None without a tokenizer.

    Args:
        make_inputs: makes the inputs of a request, which get its embeddings or KV from other services.
        max_items: media items accepted in one request.
    """

    def __init__(self, context: PromptContext, make_inputs: MakeInputs, max_items: int) -> None:
        self.tokenizer = context.tokenizer
        self._engine = context.engine
        self.tokenization = (
            Tokenization(context.tokenizer, context.engine.max_model_len) if context.tokenizer is not None else None
        )
        self._prompt_config = context.config
        self._context = context
        self._make_inputs = make_inputs
        self._max_items = max_items
        self.recent: deque[RecentRequest] = deque(maxlen=_MAX_RECENT)

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self._engine.max_model_len

    def close(self) -> None:
        """Ends the threads that tokenize long prompts."""
        if self.tokenization is not None:
            self.tokenization.close()

    def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`."""
        self._engine.reset_prefix_cache()

    # A token passes through the handle's generator and one of these two only: each more costs one more resumption.

    async def generate(
        self, request: GenerationRequest, observe: Observe = _ignore, layouts: Sequence[Layout] | None = None
    ) -> AsyncGenerator[GenerationEvent]:
        """Yields one Started, PromptLogprobs where asked for, Deltas, one Finished.

        Closing the iteration cancels the request everywhere.

        Args:
            observe: called with each event.
            layouts: of the request's media, where another answer to the same prompt has received them.

        Raises:
            VitrineError: why the request failed.
        """
        async with self._running(request, layouts=layouts) as (inputs, handle):
            prompt = await _prompt_of(inputs, handle)
            started = _started(prompt, inputs)
            observe(started)
            yield started
            text = _AnswerText(self.tokenizer, request)
            wants_prompt_logprobs = request.sampling.prompt_logprobs is not None
            async for output in handle:
                if wants_prompt_logprobs:
                    wants_prompt_logprobs = False
                    of_prompt = PromptLogprobs([None, *handle.prompt_logprobs])
                    observe(of_prompt)
                    yield of_prompt
                if request.prompt_only:  # the engine samples a token behind every prompt
                    finished = self._finished(request, prompt, handle, inputs, "length", 0)
                    observe(finished)
                    yield finished
                    return
                delta, finish_reason = text.push(output)
                observe(delta)
                yield delta
                if finish_reason is not None:
                    finished = self._finished(request, prompt, handle, inputs, finish_reason, text.num_tokens)
                    observe(finished)
                    yield finished
                    return

    async def prefill(self, request: GenerationRequest, observe: Observe = _ignore) -> AsyncGenerator[GenerationEvent]:
        """Yields one Started, one FirstToken, one Finished. The KV can be read until the iteration is resumed.

        Args:
            observe: called with each event.

        Raises:
            VitrineError: why the request failed.
        """
        request = replace(request, sampling=request.sampling.first_token_only())
        async with self._running(request, keep_kv=True) as (inputs, handle):
            prompt = await _prompt_of(inputs, handle)
            started = _started(prompt, inputs)
            observe(started)
            yield started
            async for output in handle:
                engine = handle.timings
                first = FirstToken(
                    [output.token_id],
                    logprobs=[output.logprobs] if output.logprobs is not None else [],
                    kv=handle.kv(),
                    timings=stage_timings(inputs.arrivals, engine),
                    num_cached_tokens=engine.num_cached_tokens,
                )
                observe(first)
                yield first
                finished = self._finished(request, prompt, handle, inputs, output.finish_reason or "length", 1)
                observe(finished)
                yield finished

    @asynccontextmanager
    async def _running(
        self, request: GenerationRequest, keep_kv: bool = False, layouts: Sequence[Layout] | None = None
    ) -> AsyncGenerator[tuple[RequestInputs, RequestHandle]]:
        """Submits the request to the engine; leaving the context cancels it everywhere.

        Raises:
            VitrineError: why it was not submitted.
        """
        set_request_id(request.request_id)
        check_sampling(request.sampling, self._engine.vocab_size)
        check_stop_strings(request.stop)
        if len(request.media) > self._max_items:
            raise TooManyItems(
                f"the request has {len(request.media)} images and videos: at most {self._max_items} are accepted"
            )
        self._engine.check_capacity()  # before encoders work for a request that is refused
        if layouts is None:  # else another answer to the same prompt has sent them
            take_media(sum(item.nbytes for item in request.media))
        matcher = await self._matcher(request)
        num_kept = self._num_kept(request)
        if not isinstance(request.prompt, list):
            self._tokenization().check_length(request.prompt, num_kept is not None)
        inputs = self._make_inputs(self._context, request)
        inputs.matcher = matcher
        if layouts is not None:
            inputs.use_layouts(layouts)
        # First of all: encoding takes longest, and runs while the prompt is tokenized.
        inputs.start()
        handle: RequestHandle | None = None
        try:
            plan = await self._plan(request, num_kept)
            handle = await inputs.submit(plan, keep_kv)
            yield inputs, handle
        finally:
            if handle is not None:
                handle.cancel()
            await inputs.close()

    def check_capacity(self, num_answers: int) -> None:
        """Refuses a request where the engine cannot hold all its answers now.

        Raises:
            Overloaded: too many requests are running or waiting.
        """
        self._engine.check_capacity(num_answers)

    async def _matcher(self, request: GenerationRequest) -> GrammarMatcher | None:
        """
        Raises:
            BadRequest: the request's grammar cannot be used.
            Overloaded: too many grammars wait to be compiled.
        """
        if request.sampling.grammar is None:
            return None
        if self._context.grammars is None:
            field = request.grammar_field
            raise BadRequest(f"{field}: this worker runs without a tokenizer, and knows no text of tokens", field)
        try:
            return await self._context.grammars.matcher(request.sampling.grammar, request.scope.digest())
        except GrammarError as error:
            field = _field_at(request, error.path)
            raise BadRequest(f"{field}: {error}", field) from error

    def _tokenization(self) -> Tokenization:
        if self.tokenization is None:
            raise BadRequest("this worker runs without a tokenizer: send token ids instead of text")
        return self.tokenization

    async def _plan(self, request: GenerationRequest, num_kept: int | None) -> PlaceholderPlan:
        token_ids = request.prompt
        if not isinstance(token_ids, list):
            token_ids = await self._tokenization().prompt_ids(token_ids, num_kept)
            if len(token_ids) <= _SHORT_PROMPT:
                return self._with_placeholders(token_ids, num_kept, request)
        return await asyncio.to_thread(self._with_placeholders, token_ids, num_kept, request)

    def _with_placeholders(
        self, token_ids: list[int], num_kept: int | None, request: GenerationRequest
    ) -> PlaceholderPlan:
        if not token_ids:
            raise BadRequest("the prompt is empty: send some text or token ids", "prompt")
        vocab_size = self._engine.vocab_size
        if max(token_ids) >= vocab_size or min(token_ids) < 0:
            raise BadRequest(
                f"token ids must be in 0..{vocab_size - 1}, got {min(token_ids)}..{max(token_ids)}", "prompt"
            )
        if num_kept is not None:
            token_ids = token_ids[-num_kept:]
        return plan_placeholders(token_ids, [item.kind for item in request.media], self._prompt_config)

    def _num_kept(self, request: GenerationRequest) -> int | None:
        """The number of tokens that a truncated prompt keeps; None for all.

        Raises:
            BadRequest: the number is out of range, or the prompt has media, whose placeholders may be cut.
        """
        num_wanted = request.truncate_prompt_tokens
        if num_wanted is None:
            return None
        if num_wanted < 1 and num_wanted != -1:
            raise BadRequest(
                f"truncate_prompt_tokens is {num_wanted}: it must be at least 1, or -1 for what the context holds",
                "truncate_prompt_tokens",
            )
        if request.media:
            raise BadRequest(
                "truncate_prompt_tokens is set in a request with images or videos, whose placeholders it may cut: "
                "shorten the text instead",
                "truncate_prompt_tokens",
            )
        return num_wanted if num_wanted > 0 else self._engine.max_prompt_tokens

    def _finished(
        self,
        request: GenerationRequest,
        prompt: ExpandedPrompt,
        handle: RequestHandle,
        inputs: RequestInputs,
        finish_reason: str,
        num_tokens: int,
    ) -> Finished:
        engine, ended_ms = handle.timings, inputs.elapsed_ms()
        timings = stage_timings(inputs.arrivals, engine)
        finished = Finished(finish_reason, len(prompt.token_ids), engine.num_cached_tokens, num_tokens, timings)
        with harmless("the record of a request"):
            passed = stages(inputs.arrivals, engine, ended_ms)
            for stage in passed:
                if stage.item_index is None:  # encoders trace the stages of items themselves
                    past_span(stage.name, (ended_ms - stage.start_ms) / 1e3, stage.duration_ms / 1e3)
            self.recent.append(
                RecentRequest(request.request_id, time.time(), ended_ms, len(request.media), finished, passed)
            )
        return finished


class _AnswerText:
    """Turns an answer's tokens into text, which ends before the first stop string.

    Args:
        tokenizer: None for tokens without text.
    """

    def __init__(self, tokenizer: PromptTokenizer | None, request: GenerationRequest) -> None:
        self.num_tokens = 0
        self._detokenizer = tokenizer.detokenizer(request.skip_special_tokens) if tokenizer is not None else None
        self._stop = StopStrings(request.stop, request.include_stop_str_in_output)
        self._with_stop_token = request.include_stop_str_in_output
        self._min_tokens = request.sampling.min_tokens
        self._stop_token_ids = request.sampling.stop_token_ids

    def push(self, output: TokenOutput) -> tuple[Delta, str | None]:
        """Returns the token with the text that is certain by now, and the finish reason if the answer ends here."""
        self.num_tokens += 1
        text = ""
        # An answer may also end with the last token of its grammar, which is text.
        is_stop_token = output.finish_reason == "stop" and output.token_id in self._stop_token_ids
        if self._detokenizer is not None and (not is_stop_token or self._with_stop_token):
            text = self._stop.push(self._detokenizer.push(output.token_id), self.num_tokens > self._min_tokens)
        finish_reason = "stop" if self._stop.found else output.finish_reason
        if finish_reason is not None:
            text += self._stop.flush()
        return Delta([output.token_id], text, [output.logprobs] if output.logprobs is not None else []), finish_reason


def _field_at(request: GenerationRequest, path: Sequence[str]) -> str:
    """Where a part of the request's grammar stands in what the client has sent."""
    if path and request.tool_fields:
        return ".".join((request.tool_fields[int(path[0])], *path[1:]))
    return ".".join((request.grammar_field, *path))


def _started(prompt: ExpandedPrompt, inputs: RequestInputs) -> Started:
    return Started(len(prompt.token_ids), prompt.num_media_tokens, prompt.token_ids, inputs.layouts)


async def _prompt_of(inputs: RequestInputs, handle: RequestHandle) -> ExpandedPrompt:
    """Waits for the prompt; it is never known where the request fails in the engine before.

    Raises:
        VitrineError: why the request failed.
    """
    await asyncio.wait((inputs.prompt, handle.failed), return_when=asyncio.FIRST_COMPLETED)
    if not inputs.prompt.done():
        raise handle.failed.result()
    return inputs.prompt.result()
