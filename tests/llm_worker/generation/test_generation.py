"""One request from start to end on a real engine; embeddings come from a real encoder server without a tower."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from tests.embedding_transport.clients.encoder_stub import StubServicer, running_stub
from tests.llm_worker.frontend.serving import MAX_ITEMS, LocalWorker, identity, serving
from vitrine_vlm.errors import (
    BadRequest,
    EncoderUnavailable,
    InternalError,
    NotAnImage,
    PlaceholderMismatch,
    PromptTooLong,
    TooManyItems,
    VitrineError,
)
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.generation import request_inputs
from vitrine_vlm.llm_worker.generation.encoder_inputs import EncoderInputs
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, GenerationRequest, Started
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.generation.layout_cache import layout_keys
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import MediaItem

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
async def stub(checkpoint_folder: Path) -> AsyncIterator[tuple[str, StubServicer]]:
    async with running_stub(None, identity(checkpoint_folder)) as (address, servicer, _):
        yield address, servicer


@pytest.fixture
async def worker(checkpoint_folder: Path, stub: tuple[str, StubServicer]) -> AsyncIterator[LocalWorker]:
    async with serving(checkpoint_folder, stub[0]) as worker:
        yield worker


def request(
    prompt: str | list[int], media: tuple[str, ...] = (), stop: tuple[str, ...] = (), max_tokens: int = 12
) -> GenerationRequest:
    items = tuple(MediaItem("image", data=each.encode()) for each in media)
    return GenerationRequest("request", prompt, items, SamplingParams(max_tokens, temperature=0.0), stop)


async def run(generator: Generator, asked: GenerationRequest) -> tuple[Started, list[Delta], Finished]:
    async with aclosing(generator.generate(asked)) as events:
        started, *deltas, finished = [event async for event in events]
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert all(isinstance(delta, Delta) for delta in deltas)
    return started, [delta for delta in deltas if isinstance(delta, Delta)], finished


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_text_needs_no_encoder(qwen3_vl_folder: Path) -> None:
    async with serving(qwen3_vl_folder) as worker:
        started, deltas, finished = await run(worker.generator, request("Hello"))
        assert (started.num_prompt_tokens, started.num_media_tokens) == (5, 0)
        assert (finished.finish_reason, finished.num_completion_tokens, len(deltas)) == ("length", 12, 12)
        assert finished.timings.ttft_ms >= finished.timings.prefill_ms > 0 == finished.timings.encode_ms
        with pytest.raises(EncoderUnavailable):
            await run(worker.generator, request(IMAGE, ("picture 6",)))
        await worker.until_idle()


async def test_the_same_text_gives_the_same_numbers_to_the_bit(qwen3_vl_folder: Path) -> None:
    """They would differ if a race decided how the prompt is cut into chunks."""
    async with serving(qwen3_vl_folder) as worker:
        sampling = SamplingParams(4, temperature=0.0, logprobs=0)
        asked = GenerationRequest("request", "naïve text", (), sampling)
        first, *others = [(await run(worker.generator, asked))[1] for _ in range(20)]
        assert all(deltas == first for deltas in others)


async def test_embeddings_reach_the_decoder_and_stages_are_timed(
    worker: LocalWorker, stub: tuple[str, StubServicer]
) -> None:
    started, deltas, finished = await run(worker.generator, request(f"a{IMAGE}b{IMAGE}c", ("one 6", "two 3")))
    assert (started.num_prompt_tokens, started.num_media_tokens) == (3 + 4 + 9, 9)
    assert finished.timings.encode_ms == 5
    assert finished.timings.land_ms > 0
    _, others, _ = await run(worker.generator, request(f"a{IMAGE}b{IMAGE}c", ("three 6", "two 3")))
    assert [delta.token_ids for delta in deltas] != [delta.token_ids for delta in others]
    await worker.until_idle()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(f"{IMAGE}{IMAGE}", ("one 6", "bad 3")), NotAnImage),
        (request("no placeholder", ("one 6",)), PlaceholderMismatch),
        (request([262] * 5, ("one 6",)), PlaceholderMismatch),
        (request(""), BadRequest),
        (request([-1]), BadRequest),
        (request([10**30]), BadRequest),
    ],
    ids=["bad item", "no placeholder", "wrong run", "empty", "negative id", "huge id"],
)
async def test_what_fails_leaves_nothing_behind(
    worker: LocalWorker, asked: GenerationRequest, error: type[VitrineError]
) -> None:
    if asked.prompt == [262] * 5:
        assert worker.prompt_config.image_token_id == 262
    with pytest.raises(error):
        await run(worker.generator, asked)
    await worker.until_idle()
    assert (await run(worker.generator, request(IMAGE, ("one 6",))))[2].num_completion_tokens == 12


async def test_an_internal_error_is_in_the_log_under_the_number_that_the_client_gets(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr(request_inputs, "expand_prompt", fail)
    for asked in (request("Hello"), request(IMAGE, ("one 6",))):
        caplog.clear()
        with pytest.raises(InternalError) as caught:
            await run(worker.generator, asked)
        assert "the reason" in caplog.text and "the reason" not in str(caught.value)
        number = str(caught.value).split(":")[0]
        assert number in caplog.text
    await worker.until_idle()


async def test_a_failure_before_the_prompt_is_known_is_reported_at_once(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the reason")

    async def no_layout(*arguments: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(worker.engine._forward_pass.decoder, "forward", fail)
    monkeypatch.setattr(EncoderInputs, "_encode", no_layout)
    with pytest.raises(InternalError, match="the step failed"):
        await asyncio.wait_for(run(worker.generator, request("word " * 80 + IMAGE, ("one 6",))), 5)
    await worker.until_idle()


async def test_a_repeated_picture_needs_no_encoder(worker: LocalWorker, stub: tuple[str, StubServicer]) -> None:
    prompt = f"What is in this picture? {IMAGE} And in this one? {IMAGE} What do you say?"
    started, deltas, finished = await run(worker.generator, request(prompt, ("one 40", "two 30")))
    assert (stub[1].num_items, finished.num_cached_tokens) == (2, 0)
    again = await run(worker.generator, request(prompt, ("one 40", "two 30")))
    assert (again[0], [delta.text for delta in again[1]]) == (started, [delta.text for delta in deltas])
    assert stub[1].num_items == 2
    assert again[2].num_cached_tokens == (started.num_prompt_tokens - 1) // 16 * 16
    assert again[2].timings.encode_ms == again[2].timings.ship_ms == again[2].timings.land_ms == 0
    # The KV of the first picture is cached, that behind another second picture is not.
    await run(worker.generator, request(prompt, ("one 40", "three 30")))
    assert stub[1].num_items == 4  # its layout was not cached, so both were sent
    await run(worker.generator, request(prompt, ("one 40", "three 30")))
    assert stub[1].num_items == 4
    _, deltas, finished = await run(worker.generator, request(prompt, ("three 30", "one 40")))
    assert stub[1].num_items == 6 and finished.num_cached_tokens <= 16  # no block with a picture in it
    await worker.until_idle()


async def test_tenants_and_salts_share_neither_kv_nor_layouts_nor_embeddings(
    worker: LocalWorker, stub: tuple[str, StubServicer]
) -> None:
    prompt = f"What is in this picture, and in front of it? {IMAGE} What do you say?"
    scopes = [CacheScope(), CacheScope("red"), CacheScope("blue"), CacheScope("red", "salt"), CacheScope("", "salt")]
    for number, scope in enumerate(scopes, 1):
        asked = replace(request(prompt, ("one 40",)), scope=scope)
        started, deltas, finished = await run(worker.generator, asked)
        assert (finished.num_cached_tokens, stub[1].num_items) == (0, number)
        again = await run(worker.generator, replace(asked, media=tuple(map(copy, asked.media))))
        assert [delta.text for delta in again[1]] == [delta.text for delta in deltas]
        assert again[2].num_cached_tokens == (started.num_prompt_tokens - 1) // 16 * 16
        assert stub[1].num_items == number
    assert stub[1].tenants == [scope.encoder_tenant for scope in scopes]
    assert len(set(stub[1].tenants)) == len(scopes)
    await worker.until_idle()


async def test_a_cached_layout_that_is_wrong_fails_one_request_only(worker: LocalWorker) -> None:
    """An encoder may be restarted with other settings of its processor, and give the same picture another layout."""
    asked = request(IMAGE, ("one 6",))
    await run(worker.generator, request(IMAGE, ("two 9",)))
    others = worker.layout_cache.get_all(layout_keys([MediaItem("image", data=b"two 9")], CacheScope()))
    assert others is not None
    worker.layout_cache.put(layout_keys(asked.media, asked.scope)[0], others[0])
    with pytest.raises(InternalError, match="changed in between"):
        await run(worker.generator, asked)
    await worker.until_idle()
    assert (await run(worker.generator, asked))[0].num_media_tokens == 6


async def test_media_whose_kv_was_lost_are_encoded_again(
    checkpoint_folder: Path, stub: tuple[str, StubServicer]
) -> None:
    """Each request alone needs most of the memory, so the second is preempted and computed again."""
    async with serving(checkpoint_folder, stub[0], num_blocks=10) as worker:
        asked = [request(f"{IMAGE} {name}", (f"{name} 60",), max_tokens=60) for name in ("one", "two")]
        alone = [[delta.token_ids for delta in (await run(worker.generator, each))[1]] for each in asked]
        assert stub[1].num_items == 2
        together = await asyncio.gather(*(run(worker.generator, each) for each in asked))
        assert [[delta.token_ids for delta in deltas] for _, deltas, _ in together] == alone
        assert stub[1].num_items >= 4
        await worker.until_idle()


async def test_too_many_items_are_not_even_sent(worker: LocalWorker, stub: tuple[str, StubServicer]) -> None:
    media = ("one 6",) * (MAX_ITEMS + 1)
    with pytest.raises(TooManyItems, match=str(len(media))):
        await run(worker.generator, request(IMAGE * len(media), media))
    assert stub[1].num_encodes == 0


async def test_leaving_while_an_image_is_encoded_ends_the_request_everywhere(
    worker: LocalWorker, stub: tuple[str, StubServicer]
) -> None:
    events: list[GenerationEvent] = []

    async def ask() -> None:
        async with aclosing(worker.generator.generate(request(f"before {IMAGE}", ("hang 6",)))) as generation:
            async for event in generation:
                events.append(event)

    asking = asyncio.create_task(ask())
    async with asyncio.timeout(10):
        # The prompt is known from the layout, and its text is computed although no embeddings have come.
        while not events or not worker.engine.stats().num_prefill_tokens:
            await asyncio.sleep(0.01)
    assert [type(event) for event in events] == [Started]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await worker.until_idle()
    async with asyncio.timeout(10):  # the call is cancelled by now, the encoder sees it a little later
        while stub[1].num_running:
            await asyncio.sleep(0.01)
    # The stub sends no embeddings unless this is set: those of a stream that still ran would be counted.
    stub[1].go_on.set()
    assert (await run(worker.generator, request(IMAGE, ("one 6",))))[1]
    assert stub[1].exporter.stats().shipped_nbytes["grpc"] == 6 * stub[1].identity.row_nbytes


async def test_stop_strings_end_the_text_before_them_and_the_engines_work(worker: LocalWorker) -> None:
    _, deltas, _ = await run(worker.generator, request("Hello", max_tokens=40))
    full = text_of(deltas)
    stop = full[len(full) // 2 :][:3]
    _, deltas, finished = await run(worker.generator, request("Hello", stop=(stop,), max_tokens=40))
    assert text_of(deltas) == full[: full.index(stop)]
    assert finished.finish_reason == "stop"
    assert finished.num_completion_tokens < 40
    await worker.until_idle()


async def test_stop_strings_and_stop_tokens_may_be_part_of_the_text(worker: LocalWorker) -> None:
    full = text_of((await run(worker.generator, request("Hello", max_tokens=40)))[1])
    stop = full[len(full) // 2 :][:3]
    asked = replace(request("Hello", stop=(stop,), max_tokens=40), include_stop_str_in_output=True)
    _, deltas, finished = await run(worker.generator, asked)
    assert text_of(deltas) == full[: full.index(stop)] + stop
    assert finished.finish_reason == "stop"

    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    (end,) = tokenizer.encode("<|im_end|>")
    sampling = replace(asked.sampling, allowed_token_ids=frozenset([end]), stop_token_ids=frozenset([end]))
    for include, skip, expected in ((False, False, ""), (True, True, ""), (True, False, "<|im_end|>")):
        asked = replace(
            request("Hello"), sampling=sampling, include_stop_str_in_output=include, skip_special_tokens=skip
        )
        _, deltas, finished = await run(worker.generator, asked)
        assert (text_of(deltas), finished.num_completion_tokens) == (expected, 1)


async def test_special_tokens_may_be_part_of_the_text(worker: LocalWorker) -> None:
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    end, letter = tokenizer.encode("<|im_end|>a")
    asked = request("Hello", max_tokens=4)
    sampling = replace(asked.sampling, allowed_token_ids=frozenset([end, letter]), frequency_penalty=2.0)
    asked = replace(asked, sampling=replace(sampling, logit_bias={end: 100.0, letter: 99.0}))
    _, deltas, _ = await run(worker.generator, replace(asked, skip_special_tokens=False))
    whole = text_of(deltas)
    assert "<|im_end|>" in whole and "a" in whole
    _, deltas, _ = await run(worker.generator, asked)
    assert text_of(deltas) == whole.replace("<|im_end|>", "")


async def test_stop_strings_count_from_min_tokens_on(worker: LocalWorker) -> None:
    full = text_of((await run(worker.generator, request("Hello", max_tokens=40)))[1])
    asked = request("Hello", stop=(full[0],), max_tokens=40)
    assert (await run(worker.generator, asked))[2].num_completion_tokens < 40
    _, deltas, finished = await run(worker.generator, replace(asked, sampling=replace(asked.sampling, min_tokens=40)))
    assert (text_of(deltas), finished.num_completion_tokens) == (full, 40)


async def test_a_truncated_prompt_is_its_last_tokens(worker: LocalWorker) -> None:
    expected = await run(worker.generator, request("lo"))
    for prompt in ("Hello", worker.generator.tokenizer.encode("Hello") if worker.generator.tokenizer else []):
        started, deltas, _ = await run(worker.generator, replace(request(prompt), truncate_prompt_tokens=2))
        assert started == expected[0] and text_of(deltas) == text_of(expected[1])
    long = request("x" * 600, max_tokens=8)
    with pytest.raises(PromptTooLong):
        await run(worker.generator, long)
    started, _, finished = await run(worker.generator, replace(long, truncate_prompt_tokens=-1))
    assert (started.num_prompt_tokens, finished.num_completion_tokens) == (511, 1)
    for asked in (
        replace(request("Hello"), truncate_prompt_tokens=0),
        replace(request("Hello"), truncate_prompt_tokens=-2),
        replace(request(IMAGE, ("one 6",)), truncate_prompt_tokens=100),
    ):
        with pytest.raises(BadRequest) as refused:
            await run(worker.generator, asked)
        assert refused.value.param == "truncate_prompt_tokens"


async def test_a_finished_request_is_freed_without_a_garbage_collection(worker: LocalWorker) -> None:
    asked = request(IMAGE, ("one 6",))
    picture = weakref.ref(asked.media[0])
    gc.collect()
    gc.disable()
    try:
        await run(worker.generator, asked)
        del asked
        async with asyncio.timeout(10):
            while picture() is not None:  # the engine's thread discards it
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_without_a_tokenizer_ids_go_in_and_come_out(qwen3_vl_folder: Path) -> None:
    async with serving(qwen3_vl_folder) as worker, serving(qwen3_vl_folder, with_tokenizer=False) as bare:
        assert worker.generator.tokenizer is not None
        ids = worker.generator.tokenizer.encode("Hello")
        _, expected, _ = await run(worker.generator, request("Hello"))
        _, deltas, _ = await run(bare.generator, request(ids))
        assert [delta.token_ids for delta in deltas] == [delta.token_ids for delta in expected]
        assert text_of(deltas) == ""
        with pytest.raises(BadRequest, match="without a tokenizer"):
            await run(bare.generator, request("Hello"))
