"""The inputs of a request whose prompt is computed here: encoders turn its media into embeddings for the engine."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache, layout_keys
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext, RequestInputs
from vitrine_vlm.llm_worker.generation.stages import ItemArrival
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan
from vitrine_vlm.types import EmbeddingRows, RowsEvent


class EncoderInputs(RequestInputs):
    """Makes the prompt from the layouts that encoders send, and hands their embeddings to the engine.

    Where all layouts are cached, the prompt is made first, and only items whose KV the engine lacks are encoded.
    """

    def __init__(
        self, encoders: EncoderClient, layout_cache: LayoutCache, context: PromptContext, request: GenerationRequest
    ) -> None:
        super().__init__(context, request)
        self._encoders = encoders
        self._layout_cache = layout_cache
        self._keys: list[bytes | None] = []

    def start(self) -> None:
        self._spawn(self._run())

    def send_embeddings(self, items: list[int]) -> None:
        """Has these items encoded, perhaps again: the engine needs their embeddings."""
        if not self._closed:
            self._spawn(self._encode(items))

    def _submit_to_engine(self, plan: PlaceholderPlan, keep_kv: bool) -> RequestHandle:
        request = self.request
        return self._context.engine.submit(
            request.request_id,
            self._early_prefix(plan),
            request.sampling,
            self.send_embeddings,
            keep_kv=keep_kv,
            matcher=self.matcher,
            scope=request.scope.digest(),
        )

    async def _run(self) -> None:
        media, scope = self.request.media, self.request.scope
        self._keys = await asyncio.to_thread(layout_keys, media, scope) if media else []
        if not self._find_layouts(self._layout_cache, self._keys):
            await self._encode(list(range(len(media))))
            return
        plan, handle = await asyncio.shield(self._submitted)
        prompt = self._expand(plan)
        missing: set[int] = set()
        if media:
            missing = await asyncio.to_thread(self._context.engine.missing_items, prompt, scope.digest())
        handle.set_prompt(prompt, missing)
        self.prompt.set_result(prompt)
        if missing:
            await self._encode(sorted(missing))

    async def _encode(self, items: list[int]) -> None:
        """Has these items encoded; makes the prompt, too, once the last layout is here."""
        request = self.request
        media = [request.media[index] for index in items]
        encoding = self._encoders.encode(media, request.request_id, request.scope.encoder_tenant)
        async with aclosing(encoding) as events:
            async for event in events:
                index = items[event.item_index]
                if isinstance(event, RowsEvent):
                    await self._set_embeddings(index, event.rows)
                else:
                    # First, so that a cached layout that was wrong fails no later request.
                    self._layout_cache.put(self._keys[index], event.layout)
                    await self._add_layout(index, event.layout)

    async def _set_embeddings(self, index: int, embeddings: EmbeddingRows) -> None:
        try:
            _, handle = await asyncio.shield(self._submitted)
        except asyncio.CancelledError:
            embeddings.release()
            raise
        self.arrivals.append(ItemArrival(index, embeddings.timings, self.elapsed_ms()))
        handle.set_embeddings(index, embeddings)
