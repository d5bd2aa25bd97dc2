"""One request from start to end: prompt, prefill, tokens, text. HTTP and gRPC are thin skins over this."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from vitrine_vlm.errors import BadRequest, TooManyItems
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, TokenOutput
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import (
    Delta,
    Finished,
    FirstToken,
    GenerationEvent,
    GenerationRequest,
    Observe,
    PromptKnown,
    Started,
)
from vitrine_vlm.llm_worker.generation.prompt_feed import PromptContext, PromptFeed
from vitrine_vlm.llm_worker.generation.stages import Stage, stage_timings, stages
from vitrine_vlm.llm_worker.generation.stop_strings import StopStrings
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan, plan_placeholders
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.service_runtime.logs import harmless, set_request_id
from vitrine_vlm.service_runtime.traces import past_span

MakeFeed: TypeAlias = Callable[[PromptContext, GenerationRequest], PromptFeed]
_MAX_RECENT = 50


@dataclass(frozen=True)
class RecentRequest:
    """finished_at: seconds since the epoch; elapsed_ms: from its arrival to its last token."""

    request_id: str
    finished_at: float
    elapsed_ms: float
    num_items: int
    finished: Finished
    stages: list[Stage]


class Generator:
    """Runs requests on the engine.

    recent: the last requests that finished, oldest first.

    Args:
        make_feed: who does for a request what is not done here.
        max_items: media items accepted in one request.
    """

    def __init__(self, context: PromptContext, make_feed: MakeFeed, max_items: int) -> None:
        self.tokenizer = context.tokenizer
        self._engine = context.engine
        self._prompt_config = context.config
        self._context = context
        self._make_feed = make_feed
        self._max_items = max_items
        self.recent: deque[RecentRequest] = deque(maxlen=_MAX_RECENT)

    # A token passes the handle's generator and one of these two, and no other: each would cost it one resumption more.

    async def generate(
        self, request: GenerationRequest, observe: Observe = lambda event: None
    ) -> AsyncGenerator[GenerationEvent]:
        """Yields one Started, Deltas, one Finished. Closing the iteration cancels the request everywhere.

        Args:
            observe: called with each event.

        Raises:
            VitrineError: why it could not be done.
        """
        async with self._running(request) as (feed, handle):
            prompt = await _prompt_of(feed, handle)
            started = Started(len(prompt.token_ids), prompt.num_media_tokens)
            observe(started)
            yield started
            text = _AnswerText(self.tokenizer, request.stop)
            async for output in handle:
                delta, finish_reason = text.push(output)
                observe(delta)
                yield delta
                if finish_reason is not None:
                    finished = self._finished(request, prompt, handle, feed, finish_reason, text.num_tokens)
                    observe(finished)
                    yield finished
                    return

    async def prefill(
        self, request: GenerationRequest, observe: Observe = lambda event: None
    ) -> AsyncGenerator[GenerationEvent]:
        """Yields one PromptKnown, one FirstToken, one Finished. The KV can be read until the iteration goes on.

        Args:
            observe: as of `generate`.

        Raises:
            VitrineError: why it could not be done.
        """
        request = replace(request, sampling=replace(request.sampling, max_tokens=1))
        async with self._running(request, keep_kv=True) as (feed, handle):
            prompt = await _prompt_of(feed, handle)
            known = PromptKnown(len(prompt.token_ids), prompt.num_media_tokens, feed.layouts)
            observe(known)
            yield known
            async for output in handle:
                engine = handle.timings
                first = FirstToken(
                    [output.token_id],
                    logprobs=[output.logprobs] if output.logprobs is not None else [],
                    kv=handle.kv(),
                    timings=stage_timings(feed.arrivals, engine),
                    num_cached_tokens=engine.num_cached_tokens,
                )
                observe(first)
                yield first
                finished = self._finished(request, prompt, handle, feed, output.finish_reason or "length", 1)
                observe(finished)
                yield finished

    @asynccontextmanager
    async def _running(
        self, request: GenerationRequest, keep_kv: bool = False
    ) -> AsyncGenerator[tuple[PromptFeed, RequestHandle]]:
        """The request while it is with the engine; leaving cancels it everywhere."""
        set_request_id(request.request_id)
        if len(request.media) > self._max_items:
            raise TooManyItems(
                f"the request has {len(request.media)} images and videos: at most {self._max_items} are accepted"
            )
        self._engine.check_capacity()  # encoders shall not work for what is refused
        feed = self._make_feed(self._context, request)
        # Before anything else: encoding is the long part, and goes on its way while the prompt is tokenized.
        feed.start()
        handle: RequestHandle | None = None
        try:
            plan = await asyncio.to_thread(self._plan, request)
            handle = await feed.begin(plan, keep_kv)
            yield feed, handle
        finally:
            if handle is not None:
                handle.cancel()
            await feed.close()

    def _plan(self, request: GenerationRequest) -> PlaceholderPlan:
        if isinstance(request.prompt, str):
            if self.tokenizer is None:
                raise BadRequest("this worker runs without a tokenizer: send token ids instead of text")
            token_ids = self.tokenizer.encode(request.prompt)
        else:
            token_ids = request.prompt
        if not token_ids:
            raise BadRequest("the prompt is empty: send some text or token ids")
        vocab_size = self._engine.vocab_size
        if max(token_ids) >= vocab_size or min(token_ids) < 0:
            raise BadRequest(f"token ids must be in 0..{vocab_size - 1}, got {min(token_ids)}..{max(token_ids)}")
        return plan_placeholders(token_ids, [item.kind for item in request.media], self._prompt_config)

    def _finished(
        self,
        request: GenerationRequest,
        prompt: ExpandedPrompt,
        handle: RequestHandle,
        feed: PromptFeed,
        finish_reason: str,
        num_tokens: int,
    ) -> Finished:
        engine, ended_ms = handle.timings, feed.since_arrival_ms()
        timings = stage_timings(feed.arrivals, engine)
        finished = Finished(finish_reason, len(prompt.token_ids), engine.num_cached_tokens, num_tokens, timings)
        with harmless("the record of a request"):
            passed = stages(feed.arrivals, engine, ended_ms)
            for stage in passed:
                if stage.item_index is None:  # the encoder tells of the others itself
                    past_span(stage.name, (ended_ms - stage.start_ms) / 1e3, stage.duration_ms / 1e3)
            self.recent.append(
                RecentRequest(request.request_id, time.time(), ended_ms, len(request.media), finished, passed)
            )
        return finished


class _AnswerText:
    """An answer's tokens as text, which ends before a stop string. tokenizer: None for tokens without text."""

    def __init__(self, tokenizer: PromptTokenizer | None, stop: Sequence[str]) -> None:
        self.num_tokens = 0
        self._detokenizer = tokenizer.detokenizer() if tokenizer is not None else None
        self._stop = StopStrings(stop)

    def push(self, output: TokenOutput) -> tuple[Delta, str | None]:
        """The token with the text that is certain by now, and why the answer ends with it, if it does."""
        self.num_tokens += 1
        text = ""
        if self._detokenizer is not None and output.finish_reason != "stop":
            text = self._stop.push(self._detokenizer.push(output.token_id))
        finish_reason = "stop" if self._stop.found else output.finish_reason
        if finish_reason is not None:
            text += self._stop.flush()
        return Delta([output.token_id], text, [output.logprobs] if output.logprobs is not None else []), finish_reason


async def _prompt_of(feed: PromptFeed, handle: RequestHandle) -> ExpandedPrompt:
    """The prompt, once it is known; it may never be where the engine has given the request up.

    Raises:
        VitrineError: why the request ended before.
    """
    waited_for: list[asyncio.Future[Any]] = [feed.prompt, handle.failed]
    await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
    if not feed.prompt.done():
        raise handle.failed.result()
    return feed.prompt.result()
