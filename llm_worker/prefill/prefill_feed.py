"""A request whose prompt is computed by a prefill worker: the KV that comes of it goes to the engine."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from vitrine_vlm.errors import InternalError
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.known_layouts import KnownLayouts, layout_keys
from vitrine_vlm.llm_worker.generation.prompt_feed import PromptContext, PromptFeed
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.wire import Prefilled
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.types import LayoutEvent, RowsEvent


class PrefillFeed(PromptFeed):
    """Nothing is asked for before the engine has room: what waits, waits here, and holds nothing elsewhere.

    Where the layouts of all items are known, so is the prompt, and only that KV is sent which the engine does not have.
    """

    def __init__(
        self, client: PrefillClient, known: KnownLayouts, context: PromptContext, request: GenerationRequest
    ) -> None:
        super().__init__(context, request)
        self._client = client
        self._known = known
        self._keys: list[bytes | None] = []
        self._has_token = False

    def start(self) -> None:
        """There is nothing to be done without tokens."""

    async def begin(self, plan: PlaceholderPlan, keep_kv: bool = False) -> RequestHandle:
        if self.request.media:
            self._keys = await asyncio.to_thread(layout_keys, self.request.media)
        layouts = self._known.all_of(self._keys)
        if layouts is not None:
            self._layouts = dict(enumerate(layouts))
            self.prompt.set_result(self._expanded(plan))
        return await super().begin(plan, keep_kv)

    def send_kv(self, first_row: int) -> None:
        """The engine has room for the prompt's KV and lacks that of the tokens from this one on, (again)."""
        if not self._closed:
            self._spawn(self._prefill(first_row))

    def _submit(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle:
        request, engine = self.request, self._context.engine
        if self.prompt.done():
            prefix, prompt = [], self.prompt.result()
        else:
            prefix, prompt = self._head_start(plan), None
        return engine.submit(
            request.request_id, prefix, request.sampling, _no_rows, self.send_kv, keep_kv=keep_kv, prompt=prompt
        )

    async def _prefill(self, first_row: int) -> None:
        plan, handle = await asyncio.shield(self._begun)
        needs_token = not self._has_token
        async with aclosing(self._client.prefill(self.request, plan.token_ids, needs_token, first_row)) as events:
            async for event in events:
                if isinstance(event, LayoutEvent):
                    # First, so that one that was known wrong fails no request after this one.
                    self._known.put(self._keys[event.item_index], event.layout)
                    await self._add_layout(event.item_index, event.layout)
                elif isinstance(event, Prefilled):
                    self._check(event)
                    self._has_token = True
                    if self.request.media:
                        self.arrivals.append(ItemArrival(0, event.media_timings, self.since_arrival_ms()))
                    handle.set_first_token(event.first, event.prefill_ms, event.num_cached_tokens)
                else:
                    self._hand_over(event, handle, first_row)

    def _check(self, prefilled: Prefilled) -> None:
        num_tokens, vocab_size = len(self._known_prompt().token_ids), self._context.engine.vocab_size
        if prefilled.num_prompt_tokens != num_tokens:
            raise InternalError(f"the prefill worker computed {prefilled.num_prompt_tokens} tokens of {num_tokens}")
        if prefilled.first.token_id is None or prefilled.first.token_id >= vocab_size:
            raise InternalError(f"the prefill worker's token is {prefilled.first.token_id}, there are {vocab_size}")

    def _hand_over(self, event: RowsEvent, handle: RequestHandle, first_row: int) -> None:
        num_tokens = len(self._known_prompt().token_ids) - first_row
        if event.rows.num_tokens != num_tokens:
            event.rows.release()
            raise InternalError(f"KV of {event.rows.num_tokens} tokens came where {num_tokens} are missing")
        handle.set_kv(event.rows)

    def _known_prompt(self) -> ExpandedPrompt:
        if not self.prompt.done():
            raise InternalError("the prefill worker sent no layout of some media item")
        return self.prompt.result()


def _no_rows(items: list[int]) -> None:
    raise AssertionError(f"rows of items {items} are not landed on a worker that only decodes")
