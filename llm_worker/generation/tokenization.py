"""Turns prompts into tokens, long ones on threads of their own: short ones never wait for them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from vitrine_vlm.errors import BadRequest, Overloaded, PromptTooLong
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.service_runtime.queue_time import QueueTime

# A text of a whole context of English or Chinese has 2 to 5 characters a token, indented code up to 10.
_MAX_CHARS_PER_TOKEN = 16
_MIN_MAX_CHARS = 1024 * 1024
_LONG_CHARS = 16 * 1024
_MAX_WAITING_TEXTS = 16
ResultT = TypeVar("ResultT")


class Tokenization:
    """
    max_chars: of one text.

    Args:
        max_model_len: most tokens of a prompt and its answer.
    """

    def __init__(self, tokenizer: PromptTokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self.max_chars = max(_MIN_MAX_CHARS, _MAX_CHARS_PER_TOKEN * max_model_len)
        self._num_waiting_chars = 0
        num_threads = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="long prompts")
        self._queue_time = QueueTime(num_threads)

    def close(self) -> None:
        """Ends the threads with what they are in the middle of, and cancels what waits for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_length(self, prompt: str | ChatText, is_truncated: bool = False) -> None:
        """Refuses a text by its length alone.

        Args:
            is_truncated: whether its last tokens are enough.

        Raises:
            PromptTooLong: the context cannot hold a text of this length, whatever is in it.
            BadRequest: the text is longer than what is read.
        """
        text = _text(prompt)
        if not is_truncated:
            self._check_fits(self._tokenizer.bound.min_tokens(text))
        if len(text) > self.max_chars:
            raise BadRequest(
                f"a prompt of {len(text)} characters is too long to be read: at most {self.max_chars} are, "
                f"{_MAX_CHARS_PER_TOKEN} for each token of the context: shorten the text"
            )

    async def prompt_ids(self, prompt: str | ChatText, num_kept: int | None = None) -> list[int]:
        """Returns the ids of a prompt whose length is checked.

        Args:
            num_kept: the last ids only, at most this many; None for all.

        Raises:
            PromptTooLong: the context does not hold them.
            BadRequest: see `pieces_of`.
            Overloaded: too many long prompts wait.
        """
        return await self._run(lambda pieces: self._up_to_context(pieces, num_kept), prompt, num_kept is not None)

    async def all_ids(self, prompt: str | ChatText) -> list[int]:
        """Returns all ids of a text whose length is checked, also where the context does not hold them.

        Raises:
            BadRequest, Overloaded: see `prompt_ids`.
        """
        return await self._run(_joined, prompt)

    async def _run(
        self, work: Callable[[Iterator[list[int]]], ResultT], prompt: str | ChatText, from_end: bool = False
    ) -> ResultT:
        num_chars = len(_text(prompt))
        stopped = threading.Event()
        pieces = _until(stopped, self._tokenizer.encode_in_pieces(prompt, from_end))
        if num_chars <= _LONG_CHARS:
            return await asyncio.to_thread(work, pieces)
        if self._num_waiting_chars > _MAX_WAITING_TEXTS * self.max_chars:
            raise Overloaded(
                f"prompts of {self._num_waiting_chars} characters wait to be tokenized: try again",
                self._queue_time.seconds(self._num_waiting_chars),
            )

        def measured() -> ResultT:
            with self._queue_time.work(num_chars):
                return work(pieces)

        self._num_waiting_chars += num_chars
        try:
            return await asyncio.wrap_future(self._threads.submit(copy_context().run, measured))
        finally:
            stopped.set()  # the client may have disconnected
            self._num_waiting_chars -= num_chars

    def _up_to_context(self, pieces: Iterator[list[int]], num_kept: int | None) -> list[int]:
        """The ids, read no further than the context goes, or than `num_kept` asks of pieces that come from the end."""
        read: list[list[int]] = []
        num_read = 0
        for ids in pieces:
            if num_read >= self._max_model_len:
                self._check_fits(num_read + len(ids))
            read.append(ids)
            num_read += len(ids)
            if num_kept is not None and num_read >= num_kept:
                break
        if num_kept is None:
            return _joined(read)
        return _joined(reversed(read))[-num_kept:]

    def _check_fits(self, least: int) -> None:
        if least >= self._max_model_len:
            # As the scheduler says it, which knows the exact number.
            raise PromptTooLong(
                f"Input tokens exceed the configured limit of {self._max_model_len} tokens, the answer included: the "
                f"prompt has at least {least}. Shorten the text, or start the worker with a larger --max-model-len"
            )


def _text(prompt: str | ChatText) -> str:
    """As long as the text that is encoded, and of ASCII only where that is."""
    return prompt if isinstance(prompt, str) else prompt.text


def _joined(pieces: Iterable[list[int]]) -> list[int]:
    return [token_id for ids in pieces for token_id in ids]


def _until(stopped: threading.Event, pieces: Iterator[list[int]]) -> Iterator[list[int]]:
    for ids in pieces:
        if stopped.is_set():
            raise CancelledError
        yield ids
