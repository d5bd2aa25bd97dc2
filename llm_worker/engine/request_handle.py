"""A request as its frontend holds it; the engine's thread answers through an outbox."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from embedding_transport.errors import VitrineError
from embedding_transport.types import EmbeddingRows
from llm_worker.engine.kv_rows import CachedKv
from llm_worker.engine.request import EngineTimings, ExpandedPrompt, TokenOutput
from llm_worker.engine.sampler import NextToken
from llm_worker.engine.sequence import Sequence

if TYPE_CHECKING:
    from llm_worker.engine.engine import Engine

T = TypeVar("T")


class RequestHandle:
    """A request as the frontend holds it: iterate over its tokens. Belongs to the event loop that submitted it.

    failed: why it ended early, once it has.
    """

    def __init__(self, engine: Engine, request_id: str) -> None:
        self.request_id = request_id
        self.timings = EngineTimings()
        self.sequence: Sequence
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[TokenOutput | VitrineError] = asyncio.Queue()
        self.failed: asyncio.Future[VitrineError] = self._loop.create_future()

    def set_prompt(self, prompt: ExpandedPrompt, coming: Iterable[int] | None = None) -> None:
        """The whole prompt; it begins with the prefix that was submitted.

        Args:
            coming: media items whose rows will be handed over without being asked for; None for all.
        """
        items = {span.item_index for span in prompt.spans} if coming is None else set(coming)
        self._engine.call(self._engine.on_prompt, self.sequence, prompt, items)

    def set_rows(self, item_index: int, rows: EmbeddingRows) -> None:
        """Hands rows over: the engine releases them once they have landed, or when the request ends."""
        self._engine.call(self._engine.on_rows, self.sequence, item_index, rows)

    def set_first_token(self, first: NextToken, prefill_ms: float, num_cached_tokens: int) -> None:
        """The answer's first token, where the prompt is computed elsewhere; it comes after the prompt.

        Args:
            prefill_ms, num_cached_tokens: of the computation there.
        """
        self._engine.call(self._engine.on_first_token, self.sequence, first, prefill_ms, num_cached_tokens)

    def set_kv(self, rows: EmbeddingRows) -> None:
        """Hands over the KV that was asked for, a row a token (see `kv_rows.py`), as `set_rows` does media rows."""
        self._engine.call(self._engine.on_kv, self.sequence, rows)

    def kv(self) -> CachedKv:
        """The prompt's KV: from the last token until `cancel`, for a request that was submitted with `keep_kv`."""
        return self._engine.kv_of(self.sequence)

    def cancel(self) -> None:
        """Ends the request and frees everything, also what it was to keep. Later calls do nothing."""
        self._engine.call(self._engine.on_cancel, self.sequence)

    def fail(self, error: VitrineError) -> None:
        """Ends the request; the iteration raises `error`."""
        self._engine.call(self._engine.on_fail, self.sequence, error)

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

    def deliver(self, output: TokenOutput | VitrineError, timings: EngineTimings) -> None:
        """Called on the engine's thread."""

        def put() -> None:
            self.timings = timings
            if isinstance(output, VitrineError) and not self.failed.done():
                self.failed.set_result(output)
            self._outputs.put_nowait(output)

        self._engine.outbox.put(self._loop, put)

    def on_loop(self, function: Callable[[T], None]) -> Callable[[T], None]:
        """Made for the engine's thread, which calls it: has the event loop call `function`."""
        return lambda argument: self._engine.outbox.put(self._loop, functools.partial(function, argument))
