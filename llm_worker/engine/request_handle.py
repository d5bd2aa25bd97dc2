"""A frontend's handle of a request, which sends commands to the engine, and the subscriber that receives its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable

from vitrine_vlm.errors import InternalError, VitrineError
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
from vitrine_vlm.llm_worker.engine.request import EngineTimings, ExpandedPrompt, TokenLogprobs, TokenOutput
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.types import EmbeddingRows


class RequestHandle:
    """A frontend's handle of a request; iterating yields its tokens. Belongs to the event loop that submitted it.

    timings: as of the last token. failed: the error, once the request has failed.
    prompt_logprobs: of the prompt's tokens from the second on, from the first token on, where they were asked for.
    """

    def __init__(self, key: int, request_id: str, commands: CommandQueue) -> None:
        self.request_id = request_id
        self.timings = EngineTimings()
        self.prompt_logprobs: list[TokenLogprobs] = []
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
        """Passes embeddings to the engine, which releases them once they have landed, or when the request ends."""
        self._commands.put(SetEmbeddings(self._key, item_index, embeddings))

    def set_first_token(self, first: NextToken, prefill_ms: float, num_cached_tokens: int) -> None:
        """Sets the answer's first token, where the prompt is computed elsewhere; the prompt must be set before.

        Args:
            prefill_ms, num_cached_tokens: as the prefill worker reports them.
        """
        self._commands.put(SetFirstToken(self._key, first, prefill_ms, num_cached_tokens))

    def set_kv(self, kv: EmbeddingRows) -> None:
        """Passes the requested KV, a row a token (see `kv_rows.py`), to the engine, which releases it."""
        self._commands.put(SetKv(self._key, kv, time.perf_counter()))

    def kv(self) -> CachedKv:
        """The prompt's KV, valid from the last token until `cancel`; only for a request submitted with `keep_kv`."""
        assert self._kv is not None
        return self._kv

    def cancel(self) -> None:
        """Ends the request and releases everything, kept KV included. Later calls do nothing."""
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
        """Keeps an event; called by the `RequestSubscriber`."""
        self.timings = event.timings
        if isinstance(event, RequestFailed):
            if not self.failed.done():
                self.failed.set_result(event.error)
            self._outputs.put_nowait(event.error)
        else:
            self._kv = event.kv
            if event.prompt_logprobs is not None:
                self.prompt_logprobs = event.prompt_logprobs
            self._outputs.put_nowait(event.output)


class RequestSubscriber:
    """Receives the events of one request: tokens go to its handle, requests for inputs to the frontend's functions.

    The engine holds it while the request runs. The handle does not hold it: that would be a reference cycle, and the
    bytes of all media would stay until a garbage collection, which stops all threads.
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
        try:
            self._receive(event)
        except Exception as error:  # the request would wait for ever for what could not be requested
            self._handle.fail(InternalError(f"an event of the engine was not taken: {type(error).__name__}"))
            raise

    def _receive(self, event: Event) -> None:
        match event:
            case TokenSampled() | RequestFailed():
                self._handle.receive(event)
            case EmbeddingsNeeded(items):
                self._send_embeddings(items)
            case KvNeeded(first_token):
                assert self._send_kv is not None
                self._send_kv(first_token)
