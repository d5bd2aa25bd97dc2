"""One request from start to end: encode, prompt, prefill, tokens, text. HTTP and gRPC are thin skins over this."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from embedding_transport.encoder_client import EncoderClient
from embedding_transport.errors import BadRequest, InternalError, TooManyItems, VitrineError
from embedding_transport.types import EmbeddingRows, Layout, RowsEvent
from llm_worker.engine.engine import Engine, RequestHandle
from llm_worker.engine.request import ExpandedPrompt, TokenOutput
from llm_worker.frontend.events import (
    Delta,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Started,
)
from llm_worker.frontend.known_layouts import KnownLayouts, layout_keys
from llm_worker.frontend.stages import ItemArrival, Stage, stage_timings, stages
from llm_worker.frontend.stop_strings import StopStrings
from llm_worker.prompt.config import PromptConfig
from llm_worker.prompt.expand import expand_prompt
from llm_worker.prompt.placeholders import PlaceholderPlan, plan_placeholders
from llm_worker.prompt.tokenizer import PromptTokenizer
from service_runtime.logs import set_request_id
from service_runtime.traces import past_span

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
    """Runs requests on the engine and the encoders.

    recent: the last requests that finished, oldest first.

    Args:
        tokenizer: None takes and returns token ids only.
        max_items: media items accepted in one request.
    """

    def __init__(
        self,
        engine: Engine,
        encoders: EncoderClient,
        tokenizer: PromptTokenizer | None,
        prompt_config: PromptConfig,
        max_items: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._engine = engine
        self._encoders = encoders
        self._prompt_config = prompt_config
        self._max_items = max_items
        self._layouts = KnownLayouts()
        self.recent: deque[RecentRequest] = deque(maxlen=_MAX_RECENT)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yields one Started, Deltas, one Finished. Closing the iteration cancels the request everywhere.

        Raises:
            VitrineError: why it could not be done.
        """
        set_request_id(request.request_id)
        if len(request.media) > self._max_items:
            raise TooManyItems(
                f"the request has {len(request.media)} images and videos: at most {self._max_items} are accepted"
            )
        media = _MediaFeed(self._engine, self._encoders, request, self._prompt_config, self.tokenizer, self._layouts)
        # Before anything else: encoding is the long part, and goes on its way while the prompt is tokenized.
        media.start()
        handle: RequestHandle | None = None
        try:
            plan = await asyncio.to_thread(self._plan, request)
            # Without media the whole prompt follows at once: a head start would only race with it, and how the prompt
            # is cut into chunks shows in the last bits of the logits.
            prefix = plan.token_ids[: plan.num_prefix_tokens] if request.media else []
            handle = self._engine.submit(request.request_id, prefix, request.sampling, media.send_rows)
            media.begin(plan, handle)
            prompt = await media.prompt
            yield Started(len(prompt.token_ids), prompt.num_media_tokens)
            async for event in self._stream(request, prompt, handle, media):
                yield event
        finally:
            if handle is not None:
                handle.cancel()
            await media.close()

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

    async def _stream(
        self, request: GenerationRequest, prompt: ExpandedPrompt, handle: RequestHandle, media: _MediaFeed
    ) -> AsyncGenerator[GenerationEvent]:
        detokenizer = self.tokenizer.detokenizer() if self.tokenizer is not None else None
        stop = StopStrings(request.stop)
        num_tokens = 0
        async for output in handle:
            num_tokens += 1
            ended_by_token = output.finish_reason == "stop"
            text = ""
            if detokenizer is not None and not ended_by_token:
                text = stop.push(detokenizer.push(output.token_id))
            finish_reason = "stop" if stop.found else output.finish_reason
            if finish_reason is not None:
                text += stop.flush()
            yield _delta(output, text)
            if finish_reason is not None:
                yield self._finished(request, prompt, handle, media, finish_reason, num_tokens)
                return

    def _finished(
        self,
        request: GenerationRequest,
        prompt: ExpandedPrompt,
        handle: RequestHandle,
        media: _MediaFeed,
        finish_reason: str,
        num_tokens: int,
    ) -> Finished:
        engine, ended_ms = handle.timings, media.since_arrival_ms()
        timings = stage_timings(media.arrivals, engine)
        finished = Finished(finish_reason, len(prompt.token_ids), engine.num_cached_tokens, num_tokens, timings)
        passed = stages(media.arrivals, engine, ended_ms)
        for stage in passed:
            if stage.item_index is None:  # the encoder tells of the others itself
                past_span(stage.name, (ended_ms - stage.start_ms) / 1e3, stage.duration_ms / 1e3)
        self.recent.append(
            RecentRequest(request.request_id, time.time(), ended_ms, len(request.media), finished, passed)
        )
        return finished


@dataclass
class _MediaFeed:
    """Takes in what the encoders send for one request: layouts become the prompt, rows go to the engine.

    Items whose layouts are known need no encoder to make a prompt, and those whose KV the engine still has none at all.
    """

    engine: Engine
    encoders: EncoderClient
    request: GenerationRequest
    config: PromptConfig
    tokenizer: PromptTokenizer | None
    known: KnownLayouts
    arrivals: list[ItemArrival] = field(default_factory=list)
    started_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.prompt: asyncio.Future[ExpandedPrompt] = loop.create_future()
        # Read even if the request has failed for another reason: asyncio reports errors that nobody looks at.
        self.prompt.add_done_callback(lambda prompt: prompt.cancelled() or prompt.exception())
        self._begun: asyncio.Future[tuple[PlaceholderPlan, RequestHandle]] = loop.create_future()
        self._keys: list[bytes | None] = []
        self._layouts: dict[int, Layout] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        self._spawn(self._run())

    def since_arrival_ms(self) -> float:
        return (time.perf_counter() - self.started_at) * 1e3

    def begin(self, plan: PlaceholderPlan, handle: RequestHandle) -> None:
        """The prompt is tokenized and the engine has the request."""
        self._begun.set_result((plan, handle))

    def send_rows(self, items: list[int]) -> None:
        """The engine needs these items' rows, (again)."""
        if not self._closed:
            self._spawn(self._encode(items))

    async def close(self) -> None:
        """Ends everything that is still under way."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.prompt.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._failing_the_request(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _failing_the_request(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except VitrineError as error:
            await self._fail(error)
        except Exception as error:
            await self._fail(InternalError(f"taking the media in failed: {type(error).__name__}"))
            raise

    async def _run(self) -> None:
        media = self.request.media
        self._keys = await asyncio.to_thread(layout_keys, media) if media else []
        layouts = [self.known.get(key) for key in self._keys]
        if not all(layouts):
            await self._encode(list(range(len(media))))
            return
        self._layouts = {index: layout for index, layout in enumerate(layouts) if layout is not None}
        plan, handle = await asyncio.shield(self._begun)
        prompt = self._expanded(plan)
        missing = await asyncio.to_thread(self.engine.missing_items, prompt) if media else set()
        handle.set_prompt(prompt, missing)
        self.prompt.set_result(prompt)
        if missing:
            await self._encode(sorted(missing))

    async def _encode(self, items: list[int]) -> None:
        """On the encoders; makes the prompt, too, once the last layout is there."""
        media = [self.request.media[index] for index in items]
        async with aclosing(self.encoders.encode(media, self.request.request_id)) as events:
            async for event in events:
                index = items[event.item_index]
                if isinstance(event, RowsEvent):
                    await self._set_rows(index, event.rows)
                else:
                    await self._set_layout(index, event.layout)

    async def _set_layout(self, index: int, layout: Layout) -> None:
        earlier = self._layouts.setdefault(index, layout)
        if earlier != layout:
            raise InternalError(f"media item {index} is {layout} now and was {earlier}: it changed in between")
        self.known.put(self._keys[index], layout)
        if len(self._layouts) == len(self.request.media) and not self.prompt.done():
            plan, handle = await asyncio.shield(self._begun)
            prompt = self._expanded(plan)
            handle.set_prompt(prompt)
            self.prompt.set_result(prompt)

    def _expanded(self, plan: PlaceholderPlan) -> ExpandedPrompt:
        layouts = [self._layouts[index] for index in range(len(self.request.media))]
        encode_text = self.tokenizer.encode if self.tokenizer is not None else None
        return expand_prompt(plan, layouts, self.config, encode_text)

    async def _set_rows(self, index: int, rows: EmbeddingRows) -> None:
        try:
            _, handle = await asyncio.shield(self._begun)
        except asyncio.CancelledError:
            rows.release()
            raise
        self.arrivals.append(ItemArrival(index, rows.timings, self.since_arrival_ms()))
        handle.set_rows(index, rows)

    async def _fail(self, error: VitrineError) -> None:
        if not self.prompt.done():
            self.prompt.set_exception(error)
        else:
            _, handle = await asyncio.shield(self._begun)
            handle.fail(error)


def _delta(output: TokenOutput, text: str) -> Delta:
    return Delta([output.token_id], text, [output.logprobs] if output.logprobs is not None else [])
