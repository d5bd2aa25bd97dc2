"""The inputs of a request whose prompt a prefill worker computes: its first token and its KV."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from vitrine_vlm.errors import BadRequest, InternalError
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache, layout_keys
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext, RequestInputs
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.wire import Prefilled
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.types import LayoutEvent, RowsEvent


class PrefillInputs(RequestInputs):
    """Has the prompt computed once the engine has blocks for it; before, the request holds nothing on prefill workers.

    Where the layouts of all items are cached, the prompt is known first, and only the KV that the engine lacks is sent.
    """

    def __init__(
        self, client: PrefillClient, layout_cache: LayoutCache, context: PromptContext, request: GenerationRequest
    ) -> None:
        super().__init__(context, request)
        self._client = client
        self._layout_cache = layout_cache
        self._keys: list[bytes | None] = []
        self._has_token = False

    def start(self) -> None:
        """Does nothing: all work needs the prompt's token ids."""

    async def submit(self, plan: PlaceholderPlan, keep_kv: bool = False) -> RequestHandle:
        if self.request.sampling.prompt_logprobs is not None:
            raise BadRequest(
                "prompt_logprobs is set, and this worker has its prompts computed by prefill workers, which send none: "
                "send the request to a worker that computes its prompts itself",
                "prompt_logprobs",
            )
        if self.request.media:
            self._keys = await asyncio.to_thread(layout_keys, self.request.media, self.request.scope)
        if self._find_layouts(self._layout_cache, self._keys):
            self.prompt.set_result(self._expand(plan))
        return await super().submit(plan, keep_kv)

    def send_kv(self, first_row: int) -> None:
        """Has the KV of the tokens from this one on computed, perhaps again: the engine has blocks for it."""
        if not self._closed:
            self._spawn(self._prefill(first_row))

    def _submit_to_engine(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle:
        request, engine = self.request, self._context.engine
        if self.prompt.done():
            prefix, prompt = [], self.prompt.result()
        else:
            prefix, prompt = self._early_prefix(plan), None
        return engine.submit(
            request.request_id,
            prefix,
            request.sampling,
            _send_no_embeddings,
            self.send_kv,
            keep_kv=keep_kv,
            prompt=prompt,
            matcher=self.matcher,
            scope=request.scope.digest(),
        )

    async def _prefill(self, first_row: int) -> None:
        plan, handle = await asyncio.shield(self._submitted)
        needs_token = not self._has_token
        async with aclosing(self._client.prefill(self.request, plan.token_ids, needs_token, first_row)) as events:
            async for event in events:
                if isinstance(event, LayoutEvent):
                    # First, so that a cached layout that was wrong fails no later request.
                    self._layout_cache.put(self._keys[event.item_index], event.layout)
                    await self._add_layout(event.item_index, event.layout)
                elif isinstance(event, Prefilled):
                    self._check(event)
                    self._has_token = True
                    if self.request.media:
                        self.arrivals.append(ItemArrival(0, event.media_timings, self.elapsed_ms()))
                    handle.set_first_token(event.first, event.prefill_ms, event.num_cached_tokens)
                else:
                    self._hand_over(event, handle, first_row)

    def _check(self, prefilled: Prefilled) -> None:
        num_tokens, vocab_size = len(self._known_prompt().token_ids), self._context.engine.vocab_size
        if prefilled.num_prompt_tokens != num_tokens:
            raise InternalError(f"the prefill worker computed {prefilled.num_prompt_tokens} tokens of {num_tokens}")
        if prefilled.first.token_id is None or prefilled.first.token_id >= vocab_size:
            raise InternalError(
                f"the prefill worker's token is {prefilled.first.token_id}, the vocabulary has {vocab_size} tokens"
            )

    def _hand_over(self, event: RowsEvent, handle: RequestHandle, first_row: int) -> None:
        num_tokens = len(self._known_prompt().token_ids) - first_row
        if event.rows.num_tokens != num_tokens:
            event.rows.release()
            raise InternalError(
                f"the prefill worker sent KV of {event.rows.num_tokens} tokens, {num_tokens} are needed"
            )
        handle.set_kv(event.rows)

    def _known_prompt(self) -> ExpandedPrompt:
        if not self.prompt.done():
            raise InternalError("the prefill worker sent no layout of some media item")
        return self.prompt.result()


def _send_no_embeddings(items: list[int]) -> None:
    raise AssertionError(f"a decode worker lands no embeddings, those of items {items} are needed")
