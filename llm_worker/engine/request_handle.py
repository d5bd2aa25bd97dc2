"""A request as its frontend holds it: it puts commands into the engine's queue, and the engine's events end here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.commands import (
    Cancel,
    CommandQueue,
    Fail,
    SetEmbeddings,
    SetFirstToken,
    SetKv,
    SetPrompt,
)
from vitrine_vlm.llm_worker.engine.events import EmbeddingsNeeded, Event, KvNeeded, RequestFailed, TokenSampled
from vitrine_vlm.llm_worker.engine.kv_rows import CachedKv
from vitrine_vlm.llm_worker.engine.request import EngineTimings, ExpandedPrompt, TokenOutput
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.types import EmbeddingRows


class RequestHandle:
    """A request as the frontend holds it: iterate over its tokens. Belongs to the event loop that submitted it.

    timings: as of the last token. failed: why it ended early, once it has.
    """

    def __init__(self, key: int, request_id: str, commands: CommandQueue) -> None:
        self.request_id = request_id
        self.timings = EngineTimings()
        self.failed: asyncio.Future[VitrineError] = asyncio.get_running_loop().create_future()
        self._key = key
        self._commands = commands
        self._outputs: asyncio.Queue[TokenOutput | VitrineError] = asyncio.Queue()
        self._kv: CachedKv | None = None

    def set_prompt(self, prompt: ExpandedPrompt, announced: Iterable[int] | None = None) -> None:
        """Sets the whole prompt, which begins with the prefix that was submitted.

        Args:
            announced: media items whose embeddings will be set without being requested; None for all.
        """
        items = (span.item_index for span in prompt.spans) if announced is None else announced
        self._commands.put(SetPrompt(self._key, prompt, frozenset(items)))

    def set_embeddings(self, item_index: int, embeddings: EmbeddingRows) -> None:
        """Hands embeddings over: the engine releases them once they have landed, or when the request ends."""
        self._commands.put(SetEmbeddings(self._key, item_index, embeddings))

    def set_first_token(self, first: NextToken, prefill_ms: float, num_cached_tokens: int) -> None:
        """Sets the answer's first token, where the prompt is computed elsewhere, after the prompt is set.

        Args:
            prefill_ms, num_cached_tokens: of the computation there.
        """
        self._commands.put(SetFirstToken(self._key, first, prefill_ms, num_cached_tokens))

    def set_kv(self, kv: EmbeddingRows) -> None:
        """Hands over the KV that was requested, a row a token (see `kv_rows.py`), as `set_embeddings` does."""
        self._commands.put(SetKv(self._key, kv))

    def kv(self) -> CachedKv:
        """The prompt's KV: from the last token until `cancel`, for a request that was submitted with `keep_kv`."""
        assert self._kv is not None
        return self._kv

    def cancel(self) -> None:
        """Ends the request and releases everything, also what it was to keep. Later calls do nothing."""
        self._commands.put(Cancel(self._key))

    def fail(self, error: VitrineError) -> None:
        """Ends the request; the iteration raises `error`."""
        self._commands.put(Fail(self._key, error))

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        """
        Raises:
            VitrineError: why the request ended early.
        """
        while True:
            output = await self._outputs.get()
            if isinstance(output, VitrineError):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    def receive(self, event: TokenSampled | RequestFailed) -> None:
        """Called by its `RequestSubscriber`."""
        self.timings = event.timings
        if isinstance(event, RequestFailed):
            if not self.failed.done():
                self.failed.set_result(event.error)
            self._outputs.put_nowait(event.error)
        else:
            self._kv = event.kv
            self._outputs.put_nowait(event.output)


class RequestSubscriber:
    """Where the events of one request go: tokens to its handle, needs to what its frontend has for them.

    The engine holds it while the request runs. A handle does not: it would be held by what it holds itself, and with
    the bytes of all media both would stay until a garbage collection, which stops all threads.
    """

    def __init__(
        self,
        handle: RequestHandle,
        send_embeddings: Callable[[list[int]], None],
        send_kv: Callable[[int], None] | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._handle, self._send_embeddings, self._send_kv = handle, send_embeddings, send_kv

    def receive(self, event: Event) -> None:
        match event:
            case TokenSampled() | RequestFailed():
                self._handle.receive(event)
            case EmbeddingsNeeded(items):
                self._send_embeddings(items)
            case KvNeeded(first_token):
                assert self._send_kv is not None
                self._send_kv(first_token)
