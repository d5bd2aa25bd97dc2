"""The engine's commands, as values, and the queue in which they reach its thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.events import RequestFailed
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.outbox import Subscriber, send_now
from vitrine_vlm.llm_worker.engine.request import EngineTimings, ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.types import EmbeddingRows


@dataclass(frozen=True)
class Submit:
    """A new request; the other commands name it by `key`. See `Engine.submit`."""

    key: int
    request_id: str
    prefix_token_ids: list[int]
    sampling: SamplingParams
    subscriber: Subscriber
    has_remote_kv: bool
    keep_kv: bool
    prompt: ExpandedPrompt | None
    matcher: GrammarMatcher | None
    scope: bytes


@dataclass(frozen=True)
class SetPrompt:
    """See `RequestHandle.set_prompt`. announced: media items whose embeddings will be set without being requested."""

    key: int
    prompt: ExpandedPrompt
    announced: frozenset[int]


@dataclass(frozen=True)
class SetEmbeddings:
    """A media item's embeddings, which the engine releases."""

    key: int
    item_index: int
    embeddings: EmbeddingRows


@dataclass(frozen=True)
class SetFirstToken:
    """The first token of a request whose prompt is computed elsewhere. See `RequestHandle.set_first_token`."""

    key: int
    first: NextToken
    prefill_ms: float
    num_cached_tokens: int


@dataclass(frozen=True)
class SetKv:
    """The KV of a prompt that is computed elsewhere, which the engine releases. received_at: by `time.perf_counter`."""

    key: int
    kv: EmbeddingRows
    received_at: float


@dataclass(frozen=True)
class Cancel:
    """Ends the request, and releases all it holds, kept KV included."""

    key: int


@dataclass(frozen=True)
class Fail:
    """Ends the request with an error."""

    key: int
    error: VitrineError


@dataclass(frozen=True)
class ResetPrefixCache:
    """See `Engine.reset_prefix_cache`. It is about no request."""


Command: TypeAlias = Submit | SetPrompt | SetEmbeddings | SetFirstToken | SetKv | Cancel | Fail | ResetPrefixCache


class CommandQueue:
    """A queue from any thread to the engine's.

    error: why no commands are accepted any more; None while they are.
    """

    def __init__(self) -> None:
        self.error: VitrineError | None = None
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def put(self, command: Command) -> bool:
        """Returns False where the command was discarded."""
        with self._lock:
            if self.error is None:
                self._queue.put(command)
                return True
        discard(command, self.error)
        return False

    def close(self, error: VitrineError) -> None:
        """Later commands are discarded with this error; the first call counts."""
        with self._lock:
            if self.error is None:
                self.error = error
                self._queue.put(None)  # ends `wait`

    def wait(self) -> Iterator[Command]:
        """Waits for a command, or for `close`; yields the commands in the queue."""
        first = self._queue.get()
        if first is not None:
            yield first
        yield from self.pop_all()

    def pop_all(self) -> Iterator[Command]:
        """Yields the commands in the queue."""
        while not self._queue.empty():
            command = self._queue.get()
            if command is not None:
                yield command


def discard(command: Command, error: VitrineError) -> None:
    """Ends a command that is not executed: releases what it carries, fails a new request."""
    match command:
        case Submit(subscriber=subscriber):
            send_now(subscriber.loop, [(subscriber, RequestFailed(copy(error), EngineTimings()))])
        case SetEmbeddings(embeddings=carried) | SetKv(kv=carried):
            carried.release()
        case _:
            pass
