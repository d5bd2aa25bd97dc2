"""The inputs of one request: the layouts of its media, the prompt that follows from them, embeddings or KV."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from vitrine_vlm.errors import InternalError, VitrineError, as_vitrine_error
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.grammar_compiler import GrammarCompiler
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.expand import expand_prompt
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.types import Layout

# Tokens in front of the first media item that are worth a step of their own, although the media may wait for it.
_MIN_EARLY_PREFIX = 64


@dataclass(frozen=True)
class PromptContext:
    """The parts of a worker that all requests use.

    tokenizer, grammars: None where only token ids are accepted and returned.
    """

    engine: Engine
    config: PromptConfig
    tokenizer: PromptTokenizer | None
    grammars: GrammarCompiler | None = None


class RequestInputs(ABC):
    """Gets the inputs of one request from other services and hands them to the engine. An error here fails the request.

    prompt: done once every media item has a layout. arrivals: the media items whose embeddings have come, with timings.
    matcher: of the request's grammar, set before `submit`.
    """

    def __init__(self, context: PromptContext, request: GenerationRequest) -> None:
        self.request = request
        self.arrivals: list[ItemArrival] = []
        self.matcher: GrammarMatcher | None = None
        self.prompt: asyncio.Future[ExpandedPrompt] = asyncio.get_running_loop().create_future()
        # Retrieved even if the request has failed for another reason: asyncio logs exceptions that are never retrieved.
        self.prompt.add_done_callback(lambda prompt: prompt.cancelled() or prompt.exception())
        self._context = context
        self._started_at = time.perf_counter()
        self._submitted: asyncio.Future[tuple[PlaceholderPlan, RequestHandle]] = (
            asyncio.get_running_loop().create_future()
        )
        self._layouts: dict[int, Layout] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of all media items, once the prompt is known."""
        return [self._layouts[index] for index in range(len(self.request.media))]

    def use_layouts(self, layouts: Sequence[Layout]) -> None:
        """Sets the layouts of all media items, which another answer to the same prompt has received; before `start`."""
        self._layouts = dict(enumerate(layouts))

    @abstractmethod
    def start(self) -> None:
        """Begins with the work that does not need the prompt's token ids."""

    async def submit(self, plan: PlaceholderPlan, keep_kv: bool = False) -> RequestHandle:
        """Submits the request to the engine, once its prompt is tokenized.

        Args:
            keep_kv: see `Engine.submit`.

        Raises:
            PromptTooLong: the text in front of the first media item alone exceeds the context length.
            Overloaded: too many requests are waiting.
        """
        handle = self._submit_to_engine(plan, keep_kv)
        self._submitted.set_result((plan, handle))
        return handle

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started_at) * 1e3

    async def close(self) -> None:
        """Cancels everything that still runs."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.prompt.cancel()

    @abstractmethod
    def _submit_to_engine(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle: ...

    def _find_layouts(self, layout_cache: LayoutCache, keys: list[bytes | None]) -> bool:
        """Returns whether the layouts of all media items are known, from another answer or from the cache."""
        if len(self._layouts) < len(self.request.media):
            layouts = layout_cache.get_all(keys)
            if layouts is None:
                return False
            self.use_layouts(layouts)
        return True

    def _early_prefix(self, plan: PlaceholderPlan) -> list[int]:
        """Returns the tokens that the engine may compute before the prompt is known."""
        # Without media the whole prompt follows at once: an early prefix would only race with it, and the last bits of
        # the logits depend on how the prompt is cut into chunks.
        is_worthwhile = self.request.media and plan.num_prefix_tokens >= _MIN_EARLY_PREFIX
        return plan.token_ids[: plan.num_prefix_tokens] if is_worthwhile else []

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._run_or_fail(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_or_fail(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            await self._fail(as_vitrine_error(error))

    async def _fail(self, error: VitrineError) -> None:
        if not self.prompt.done():
            self.prompt.set_exception(error)
        else:
            _, handle = await asyncio.shield(self._submitted)
            handle.fail(error)

    async def _add_layout(self, index: int, layout: Layout) -> None:
        """Keeps an item's layout, and makes the prompt with the last one.

        Raises:
            InternalError: the item had another layout before.
        """
        earlier = self._layouts.setdefault(index, layout)
        if earlier != layout:
            raise InternalError(f"media item {index} is {layout} now and was {earlier}: it changed in between")
        if len(self._layouts) == len(self.request.media) and not self.prompt.done():
            self._set_prompt(*await asyncio.shield(self._submitted))

    def _set_prompt(self, plan: PlaceholderPlan, handle: RequestHandle) -> None:
        prompt = self._expand(plan)
        handle.set_prompt(prompt)
        self.prompt.set_result(prompt)

    def _expand(self, plan: PlaceholderPlan) -> ExpandedPrompt:
        tokenizer = self._context.tokenizer
        return expand_prompt(
            plan, self.layouts, self._context.config, tokenizer.encode if tokenizer is not None else None
        )
