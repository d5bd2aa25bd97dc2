"""What a request waits for: the sizes of its media, from which its prompt follows, and what the engine needs of it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from vitrine_vlm.errors import InternalError, VitrineError, as_vitrine_error
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.expand import expand_prompt
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.types import Layout

# Tokens in front of the first media item that are worth a step of their own, which the media may have to wait for.
_MIN_HEAD_START = 64


@dataclass(frozen=True)
class PromptContext:
    """What all requests of a worker have in common. tokenizer: None takes and returns token ids only."""

    engine: Engine
    config: PromptConfig
    tokenizer: PromptTokenizer | None


class PromptFeed(ABC):
    """Takes in what others do for one request. An error in it ends the request.

    prompt: known once every media item has a layout; arrivals: media items that were encoded.
    """

    def __init__(self, context: PromptContext, request: GenerationRequest) -> None:
        self.request = request
        self.arrivals: list[ItemArrival] = []
        self.prompt: asyncio.Future[ExpandedPrompt] = asyncio.get_running_loop().create_future()
        # Read even if the request has failed for another reason: asyncio reports errors that nobody looks at.
        self.prompt.add_done_callback(lambda prompt: prompt.cancelled() or prompt.exception())
        self._context = context
        self._started_at = time.perf_counter()
        self._begun: asyncio.Future[tuple[PlaceholderPlan, RequestHandle]] = asyncio.get_running_loop().create_future()
        self._layouts: dict[int, Layout] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def layouts(self) -> list[Layout]:
        """Of all media items, once the prompt is known."""
        return [self._layouts[index] for index in range(len(self.request.media))]

    @abstractmethod
    def start(self) -> None:
        """Begins with what needs no tokens."""

    async def begin(self, plan: PlaceholderPlan, keep_kv: bool = False) -> RequestHandle:
        """The prompt is tokenized: hands the request to the engine.

        Args:
            keep_kv: see `Engine.submit`.

        Raises:
            PromptTooLong: the text in front of the first media item leaves no room by itself.
            Overloaded: too many requests are waiting.
        """
        handle = self._submit(plan, keep_kv)
        self._begun.set_result((plan, handle))
        return handle

    def since_arrival_ms(self) -> float:
        return (time.perf_counter() - self._started_at) * 1e3

    async def close(self) -> None:
        """Ends everything that is still under way."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.prompt.cancel()

    @abstractmethod
    def _submit(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle: ...

    def _head_start(self, plan: PlaceholderPlan) -> list[int]:
        """Tokens that the engine may begin with before the prompt is known."""
        # Without media the whole prompt follows at once: a head start would only race with it, and how the prompt
        # is cut into chunks shows in the last bits of the logits.
        has_head_start = self.request.media and plan.num_prefix_tokens >= _MIN_HEAD_START
        return plan.token_ids[: plan.num_prefix_tokens] if has_head_start else []

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._failing_the_request(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _failing_the_request(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            await self._fail(as_vitrine_error(error))

    async def _fail(self, error: VitrineError) -> None:
        if not self.prompt.done():
            self.prompt.set_exception(error)
        else:
            _, handle = await asyncio.shield(self._begun)
            handle.fail(error)

    async def _add_layout(self, index: int, layout: Layout) -> None:
        """Makes the prompt with the last one."""
        earlier = self._layouts.setdefault(index, layout)
        if earlier != layout:
            raise InternalError(f"media item {index} is {layout} now and was {earlier}: it changed in between")
        if len(self._layouts) == len(self.request.media) and not self.prompt.done():
            self._set_prompt(*await asyncio.shield(self._begun))

    def _set_prompt(self, plan: PlaceholderPlan, handle: RequestHandle) -> None:
        prompt = self._expanded(plan)
        handle.set_prompt(prompt)
        self.prompt.set_result(prompt)

    def _expanded(self, plan: PlaceholderPlan) -> ExpandedPrompt:
        tokenizer = self._context.tokenizer
        return expand_prompt(
            plan, self.layouts, self._context.config, tokenizer.encode if tokenizer is not None else None
        )
