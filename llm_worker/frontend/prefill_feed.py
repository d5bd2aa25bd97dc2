"""A request whose prompt is computed by a prefill worker: the KV that comes of it goes to the engine."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from embedding_transport.errors import InternalError
from embedding_transport.types import LayoutEvent, RowsEvent
from llm_worker.engine.request import ExpandedPrompt
from llm_worker.engine.request_handle import RequestHandle
from llm_worker.frontend.events import GenerationRequest
from llm_worker.frontend.prompt_feed import PromptContext, PromptFeed
from llm_worker.frontend.stages import ItemArrival
from llm_worker.prefill.client import PrefillClient
from llm_worker.prefill.wire import Prefilled
from llm_worker.prompt.placeholders import PlaceholderPlan


class PrefillFeed(PromptFeed):
    """Nothing is asked for before the engine has room: what waits, waits here, and holds nothing elsewhere."""

    def __init__(self, client: PrefillClient, context: PromptContext, request: GenerationRequest) -> None:
        super().__init__(context, request)
        self._client = client
        self._has_token = False

    def start(self) -> None:
        """There is nothing to be done without tokens."""

    def begin(self, plan: PlaceholderPlan, keep_kv: bool = False) -> RequestHandle:
        handle = super().begin(plan, keep_kv)
        if not self.request.media:
            self._set_prompt(plan, handle)
        return handle

    def send_kv(self) -> None:
        """The engine has room for the prompt's KV, (again)."""
        if not self._closed:
            self._spawn(self._prefill())

    def _submit(self, prefix_token_ids: list[int], keep_kv: bool) -> RequestHandle:
        request = self.request
        return self._context.engine.submit(
            request.request_id, prefix_token_ids, request.sampling, _no_rows, self.send_kv, keep_kv
        )

    async def _prefill(self) -> None:
        plan, handle = await asyncio.shield(self._begun)
        async with aclosing(self._client.prefill(self.request, plan.token_ids, not self._has_token)) as events:
            async for event in events:
                if isinstance(event, LayoutEvent):
                    await self._add_layout(event.item_index, event.layout)
                elif isinstance(event, Prefilled):
                    self._check(event)
                    self._has_token = True
                    if self.request.media:
                        self.arrivals.append(ItemArrival(0, event.media_timings, self.since_arrival_ms()))
                    handle.set_first_token(event.first, event.prefill_ms, event.num_cached_tokens)
                else:
                    self._hand_over(event, handle)

    def _check(self, prefilled: Prefilled) -> None:
        num_tokens, vocab_size = len(self._known_prompt().token_ids), self._context.engine.vocab_size
        if prefilled.num_prompt_tokens != num_tokens:
            raise InternalError(f"the prefill worker computed {prefilled.num_prompt_tokens} tokens of {num_tokens}")
        if prefilled.first.token_id is None or prefilled.first.token_id >= vocab_size:
            raise InternalError(f"the prefill worker's token is {prefilled.first.token_id}, there are {vocab_size}")

    def _hand_over(self, event: RowsEvent, handle: RequestHandle) -> None:
        num_tokens = len(self._known_prompt().token_ids)
        if event.rows.num_tokens != num_tokens:
            event.rows.release()
            raise InternalError(f"KV of {event.rows.num_tokens} tokens for a prompt of {num_tokens}")
        handle.set_kv(event.rows)

    def _known_prompt(self) -> ExpandedPrompt:
        if not self.prompt.done():
            raise InternalError("the prefill worker sent no layout of some media item")
        return self.prompt.result()


def _no_rows(items: list[int]) -> None:
    raise AssertionError(f"rows of items {items} are not landed on a worker that only decodes")
