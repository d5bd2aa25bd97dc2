"""Texts that are too long are refused before or while they are read, and long ones keep no short one waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from vitrine_vlm.errors import BadRequest, Overloaded, PromptTooLong
from vitrine_vlm.llm_worker.generation import tokenization as module
from vitrine_vlm.llm_worker.generation.tokenization import Tokenization
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

MAX_MODEL_LEN = 4000
WORDS = "What is in this picture, and where? "


class Counted(PromptTokenizer):
    """num_pieces: that were encoded. held: where a test lets them wait. reached: once one does, or would."""

    def __init__(self) -> None:
        super().__init__(open_checkpoint(str(MODEL_FOLDER)))
        self.num_pieces = 0
        self.held = threading.Event()
        self.held.set()
        self.reached = threading.Event()

    def encode_in_pieces(self, prompt: str | ChatText, from_end: bool = False) -> Iterator[list[int]]:
        for ids in super().encode_in_pieces(prompt, from_end):
            if len(prompt if isinstance(prompt, str) else prompt.text) > 16 * 1024:
                self.reached.set()
                assert self.held.wait(10)
            self.num_pieces += 1
            yield ids


@pytest.fixture(scope="module")
def tokenizer() -> Counted:
    return Counted()


@pytest.fixture
async def tokenization(tokenizer: Counted, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tokenization]:
    tokenizer.num_pieces = 0
    tokenization = Tokenization(tokenizer, MAX_MODEL_LEN)
    yield tokenization
    tokenizer.held.set()
    tokenization.close()


async def test_a_text_that_cannot_fit_is_refused_by_its_length(tokenization: Tokenization, tokenizer: Counted) -> None:
    longest = tokenizer.bound.max_chars_per_token
    assert longest is not None
    for text in ("!" * (longest * MAX_MODEL_LEN), "猫" * (4 * longest * MAX_MODEL_LEN)):
        chat = tokenizer.render_chat(Chat([{"role": "user", "content": text}]))
        for prompt in (text, chat):
            with pytest.raises(PromptTooLong, match=r"at least 400[0-9]\. Shorten the text"):
                tokenization.check_length(prompt)
        tokenization.check_length(text[: -4 * longest])
        tokenization.check_length(text, is_truncated=True)


async def test_reading_ends_where_the_context_does(tokenization: Tokenization, tokenizer: Counted) -> None:
    with pytest.raises(PromptTooLong, match="at least"):
        await tokenization.prompt_ids("x " * 19_000)
    assert tokenizer.num_pieces == 2  # the first has 32 Ki characters, and as many tokens as there are places
    whole = tokenizer.encode(WORDS * 1000)
    assert await tokenization.all_ids(WORDS * 1000) == whole and len(whole) > MAX_MODEL_LEN


@pytest.mark.parametrize("num_kept", [1, 10, MAX_MODEL_LEN - 1, 2**40])
async def test_truncated_prompts_are_read_from_their_end(
    tokenization: Tokenization, tokenizer: Counted, num_kept: int
) -> None:
    text = WORDS * 20_000  # longer than any that fits, and truncated
    if num_kept > MAX_MODEL_LEN:
        with pytest.raises(PromptTooLong):
            await tokenization.prompt_ids(text, num_kept)
        assert await tokenization.prompt_ids("Hello", num_kept) == tokenizer.encode("Hello")
    else:
        assert await tokenization.prompt_ids(text, num_kept) == tokenizer.encode(text[-100_000:])[-num_kept:]
        assert tokenizer.num_pieces == 1 or num_kept > 1000


async def test_short_texts_do_not_wait_for_long_ones(
    tokenization: Tokenization, tokenizer: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.held.clear()
    long = WORDS * 500
    tasks = [asyncio.create_task(tokenization.prompt_ids(long, 10)) for _ in range(40)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(tokenization.prompt_ids("Hello"), 5) == tokenizer.encode("Hello")
    monkeypatch.setattr(module, "_MAX_WAITING_TEXTS", 0)
    tokenization._queue_time.add(1000, 1.0)
    with pytest.raises(Overloaded, match="wait to be tokenized") as caught:
        await tokenization.prompt_ids(long, 10)
    assert caught.value.retry_after_s == tokenization._queue_time.seconds(40 * len(long)) > 0
    for task in tasks[1:]:
        task.cancel()
    tokenizer.held.set()
    assert await tasks[0] == tokenizer.encode(long)[-10:]
    await asyncio.gather(*tasks, return_exceptions=True)
    monkeypatch.setattr(module, "_MAX_WAITING_TEXTS", 16)
    before = tokenizer.num_pieces
    assert await tokenization.prompt_ids(long, 10) == tokenizer.encode(long)[-10:]
    assert tokenizer.num_pieces <= before + 40 and tokenization._num_waiting_chars == 0


async def test_when_to_try_again_does_not_count_what_was_cancelled(
    tokenization: Tokenization, tokenizer: Counted
) -> None:
    """A cancelled text ends behind a piece, and would say that all of it took no longer."""
    tokenization._queue_time.add(1000, 1.0)
    tokenizer.held.clear()
    tokenizer.reached.clear()
    task = asyncio.create_task(tokenization.prompt_ids(WORDS * 5000, 10**6))
    before = tokenizer.num_pieces
    assert await asyncio.to_thread(tokenizer.reached.wait, 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    tokenizer.held.set()
    await asyncio.to_thread(tokenization._threads.shutdown)
    assert tokenizer.num_pieces <= before + 2, "it was not read to its end"
    assert tokenization._queue_time.seconds(1000) * tokenization._queue_time._num_threads == pytest.approx(1.0)


async def test_no_text_is_longer_than_what_is_read(tokenization: Tokenization, tokenizer: Counted) -> None:
    assert tokenization.max_chars == 1024 * 1024
    with pytest.raises(BadRequest, match="1048577 characters is too long to be read: at most 1048576"):
        tokenization.check_length("a " * 524_288 + "a", is_truncated=True)
    assert Tokenization(tokenizer, 262_144).max_chars == 4 * 1024 * 1024


@pytest.mark.parametrize(("num_cpus", "num_threads"), [(1, 1), (6, 3), (64, 4)])
def test_threads_follow_the_cpus_that_the_process_may_use(
    tokenizer: Counted, monkeypatch: pytest.MonkeyPatch, num_cpus: int, num_threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(num_cpus)))
    assert Tokenization(tokenizer, 1000)._threads._max_workers == num_threads
