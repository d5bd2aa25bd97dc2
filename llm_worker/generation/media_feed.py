"""A request whose prompt is computed here: its media go to encoders, their rows to the engine."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.known_layouts import KnownLayouts, layout_keys
from vitrine_vlm.llm_worker.generation.prompt_feed import PromptContext, PromptFeed
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.types import EmbeddingRows, RowsEvent


class MediaFeed(PromptFeed):
    """Takes in what the encoders send for one request: layouts become the prompt, rows go to the engine.

    Items whose layouts are known need no encoder to make a prompt, and those whose KV the engine still has none at all.
    """

    def __init__(
        self, encoders: EncoderClient, known: KnownLayouts, context: PromptContext, request: GenerationRequest
    ) -> None:
        super().__init__(context, request)
        self._encoders = encoders
        self._known = known
        self._keys: list[bytes | None] = []

    def start(self) -> None:
        self._spawn(self._run())

    def send_embeddings(self, items: list[int]) -> None:
        """The engine needs these items' embeddings, perhaps again."""
        if not self._closed:
            self._spawn(self._encode(items))

    def _submit(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle:
        request = self.request
        return self._context.engine.submit(
            request.request_id, self._head_start(plan), request.sampling, self.send_embeddings, keep_kv=keep_kv
        )

    async def _run(self) -> None:
        media = self.request.media
        self._keys = await asyncio.to_thread(layout_keys, media) if media else []
        layouts = self._known.all_of(self._keys)
        if layouts is None:
            await self._encode(list(range(len(media))))
            return
        self._layouts = dict(enumerate(layouts))
        plan, handle = await asyncio.shield(self._begun)
        prompt = self._expanded(plan)
        missing = await asyncio.to_thread(self._context.engine.missing_items, prompt) if media else set()
        handle.set_prompt(prompt, missing)
        self.prompt.set_result(prompt)
        if missing:
            await self._encode(sorted(missing))

    async def _encode(self, items: list[int]) -> None:
        """On the encoders; makes the prompt, too, once the last layout is there."""
        media = [self.request.media[index] for index in items]
        async with aclosing(self._encoders.encode(media, self.request.request_id)) as events:
            async for event in events:
                index = items[event.item_index]
                if isinstance(event, RowsEvent):
                    await self._set_rows(index, event.rows)
                else:
                    # First, so that one that was known wrong fails no request after this one.
                    self._known.put(self._keys[index], event.layout)
                    await self._add_layout(index, event.layout)

    async def _set_rows(self, index: int, rows: EmbeddingRows) -> None:
        try:
            _, handle = await asyncio.shield(self._begun)
        except asyncio.CancelledError:
            rows.release()
            raise
        self.arrivals.append(ItemArrival(index, rows.timings, self.since_arrival_ms()))
        handle.set_embeddings(index, rows)
