"""The engine around its decoder: late rows, early text, memory, limits, errors and cancelling."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llm_worker.engine.harness import (
    Request,
    collect,
    greedy,
    is_idle,
    running_engine,
    submit,
    submit_with_rows_at_hand,
    tokens,
    unsent,
    until,
)
from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.errors import (
    InternalError,
    LeaseExpired,
    MediaNotFound,
    Overloaded,
    PromptTooLong,
    VitrineError,
    WorkerUnavailable,
)
from vitrine_vlm.llm_worker.engine import step_executor
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.sample_models.reference import Reference


async def test_late_embeddings_delay_no_other_request_and_the_request_goes_on_when_they_come(
    qwen3_vl_folder: Path, reference: Reference, image: Request, text: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        late = engine.submit("late", image.prefix, greedy(8), unsent)
        late.set_prompt(image.prompt)
        assert await tokens(submit(engine, text, greedy(8))) == reference.greedy(text.inputs, 8)[0]
        late.set_embeddings(0, image.rows[0])
        assert await tokens(late) == reference.greedy(image.inputs, 8)[0]


async def test_text_before_the_image_is_prefilled_before_anything_is_known_of_the_image(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("early", image.prefix, greedy(8), unsent)
        # The last token of the prefix is not computed yet, in case it is the last of the prompt.
        await until(lambda: engine.stats().num_prefill_tokens == len(image.prefix) - 1)
        handle.set_prompt(image.prompt)
        handle.set_embeddings(0, image.rows[0])
        assert await tokens(handle) == reference.greedy(image.inputs, 8)[0]
        assert engine.stats().num_prefill_tokens == len(image.prompt.token_ids)


async def test_embeddings_may_come_before_the_prompt_and_after_the_end(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("rows first", image.prefix, greedy(4), unsent)
        handle.set_embeddings(0, image.rows[0])
        await asyncio.sleep(0.05)
        handle.set_prompt(image.prompt)
        assert await tokens(handle) == reference.greedy(image.inputs, 4)[0]
        too_late = TensorRows(torch.zeros(1, 1))
        handle.set_embeddings(0, too_late)
        await until(lambda: too_late.num_releases == 1)


async def test_a_prompt_that_is_all_prefix_is_still_sampled_from(
    qwen3_vl_folder: Path, reference: Reference, text: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("text", text.prefix, greedy(4), unsent)
        await until(lambda: engine.stats().num_prefill_tokens == len(text.prefix) - 1)
        handle.set_prompt(text.prompt)
        assert await tokens(handle) == reference.greedy(text.inputs, 4)[0]


@pytest.mark.parametrize("stage", ["before the prompt", "waiting for rows", "decoding"])
async def test_cancel_frees_everything(qwen3_vl_folder: Path, image: Request, stage: str) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("cancelled", image.prefix, greedy(400), unsent)
        rows = image.rows[0]
        if stage == "before the prompt":
            handle.set_embeddings(0, rows)
        else:
            handle.set_prompt(image.prompt)
            if stage == "decoding":
                handle.set_embeddings(0, rows)
                await anext(aiter(handle))
        await until(lambda: engine.stats().running == 1)
        handle.cancel()
        handle.cancel()
        await until(lambda: is_idle(engine))
        assert rows.num_releases == (0 if stage == "waiting for rows" else 1)


async def test_fail_raises_where_the_tokens_are_awaited(qwen3_vl_folder: Path, image: Request) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("failed", image.prefix, greedy(4), unsent)
        handle.set_prompt(image.prompt)
        handle.fail(MediaNotFound("no such image"))
        with pytest.raises(MediaNotFound, match="no such image"):
            await collect(handle)
        await until(lambda: is_idle(engine))


@pytest.mark.parametrize("prefix_cache", [False, True])
async def test_more_requests_than_memory_all_finish(
    qwen3_vl_folder: Path, reference: Reference, image: Request, prefix_cache: bool
) -> None:
    """There are blocks for two requests and ten come: preempted ones are computed again, embeddings included."""
    expected = reference.greedy(image.inputs, 40)[0]
    num_blocks = 2 * -(-(len(image.prompt.token_ids) + 40) // 8)
    with running_engine(qwen3_vl_folder, num_blocks=num_blocks, prefix_cache=prefix_cache) as engine:
        handles = [submit_with_rows_at_hand(engine, image, greedy(40)) for _ in range(10)]
        assert await asyncio.gather(*map(tokens, handles)) == [expected] * 10
        assert engine.stats().num_preempted > 0
        assert is_idle(engine)


async def test_an_equal_beginning_is_computed_once_and_its_picture_is_not_needed(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    known = replace(image, prompt=replace(image.prompt, content_hashes=(b"the picture",)))
    expected = reference.greedy(image.inputs, 8)[0]
    num_prompt = len(image.prompt.token_ids)
    with running_engine(qwen3_vl_folder) as engine:
        assert engine.missing_items(known.prompt) == {0}
        assert await tokens(submit(engine, known, greedy(8))) == expected
        assert engine.missing_items(known.prompt) == set()
        computed = engine.stats().num_prefill_tokens
        assert computed == num_prompt
        handle = engine.submit("again", image.prefix, greedy(8), unsent)
        handle.set_prompt(known.prompt, announced=())
        assert await tokens(handle) == expected
        num_cached = (num_prompt - 1) // 8 * 8
        assert handle.timings.num_cached_tokens == engine.stats().num_cached_tokens == num_cached
        # The text may have run ahead, before the prompt was known.
        assert engine.stats().num_prefill_tokens - computed in (
            num_prompt - num_cached,
            num_prompt - num_cached + len(image.prefix) - 1,
        )
        # Embeddings that come although they are not needed are released at once.
        surplus = TensorRows(image.rows[0]._rows_TW)
        handle = engine.submit("late embeddings", image.prefix, greedy(8), unsent)
        handle.set_prompt(known.prompt)
        handle.set_embeddings(0, surplus)
        assert await tokens(handle) == expected
        assert surplus.num_releases == 1
        # Another picture with the same size is another prompt.
        other = replace(image.prompt, content_hashes=(b"another picture",))
        assert engine.missing_items(other) == {0}


async def test_without_the_prefix_cache_everything_is_computed(qwen3_vl_folder: Path, image: Request) -> None:
    known = replace(image, prompt=replace(image.prompt, content_hashes=(b"the picture",)))
    with running_engine(qwen3_vl_folder, prefix_cache=False) as engine:
        for _ in range(2):
            handle = submit(engine, replace(known, rows=[TensorRows(image.rows[0]._rows_TW)]), greedy(2))
            assert len(await tokens(handle)) == 2
            assert engine.missing_items(known.prompt) == {0}
        assert engine.stats().num_prefill_tokens == 2 * len(image.prompt.token_ids)


async def test_too_long_prompts_are_refused_and_long_answers_cut(
    qwen3_vl_folder: Path, reference: Reference, text: Request
) -> None:
    num_prompt = len(text.prompt.token_ids)
    for max_model_len, num_blocks in ((num_prompt, 64), (512, num_prompt // 8)):
        with running_engine(qwen3_vl_folder, max_model_len=max_model_len, num_blocks=num_blocks) as engine:
            with pytest.raises(PromptTooLong, match=str(num_prompt)):
                await collect(submit(engine, text, greedy(4)))
            assert is_idle(engine)
    with running_engine(qwen3_vl_folder, max_model_len=num_prompt + 3) as engine:
        outputs = await collect(submit(engine, text, SamplingParams(temperature=0.0)))
        assert [output.finish_reason for output in outputs] == [None, None, "length"]


async def test_text_that_is_too_long_by_itself_is_refused_before_its_media_are_known(qwen3_vl_folder: Path) -> None:
    """A GPU's block table has no columns for more, and the request would wait for KV that is never requested."""
    with running_engine(qwen3_vl_folder, max_model_len=64) as engine:
        for send_kv in (None, lambda first_row: None):
            with pytest.raises(PromptTooLong, match="64"):
                engine.submit("too long", [1] * 64, greedy(4), unsent, send_kv)
        assert engine.stats().num_steps == 0
        engine.submit("fits", [1] * 63, greedy(4), unsent)
        await until(lambda: engine.stats().num_prefill_tokens == 62)
        assert (engine.stats().running, engine.stats().waiting) == (1, 0)


async def test_stop_tokens_end_a_generation(qwen3_vl_folder: Path, reference: Reference, text: Request) -> None:
    expected = reference.greedy(text.inputs, 16)[0]
    stop = expected[5]
    with running_engine(qwen3_vl_folder) as engine:
        sampling = replace(greedy(16), stop_token_ids=frozenset({stop}))
        outputs = await collect(submit(engine, text, sampling))
    assert [output.token_id for output in outputs] == expected[: expected.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"


async def test_too_many_requests_are_refused(qwen3_vl_folder: Path, image: Request, text: Request) -> None:
    with running_engine(qwen3_vl_folder, max_num_seqs=2, max_waiting=1) as engine:
        waiting = [engine.submit(str(index), image.prefix, greedy(4), unsent) for index in range(3)]
        with pytest.raises(Overloaded, match="3"):
            engine.submit("one too many", image.prefix, greedy(4), unsent)
        waiting[0].cancel()
        await until(lambda: engine._capacity.num_used == 2)
        assert len(await tokens(submit(engine, text, greedy(4)))) == 4


async def test_expired_embeddings_are_requested_again(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        lost = [TensorRows(torch.zeros(12, 1), error=LeaseExpired("lease 1 is over")) for _ in range(2)]
        coming = [*lost, image.rows[0]]
        handle: RequestHandle = engine.submit(
            "expired", image.prefix, greedy(8), lambda items: handle.set_embeddings(0, coming.pop(0))
        )
        handle.set_prompt(image.prompt)
        handle.set_embeddings(0, coming.pop(0))
        assert await tokens(handle) == reference.greedy(image.inputs, 8)[0]
        assert [rows.num_releases for rows in (*lost, image.rows[0])] == [1, 1, 1]


async def test_each_of_many_pictures_may_expire_once(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    """A request that waited for memory for longer than leases last has lost all its embeddings."""
    span = image.prompt.spans[0]
    kept_back, length = len(image.prompt.token_ids) - span.stop, span.length // 6
    spans = tuple(MediaSpan(item, span.start + item * length, length, 0) for item in range(6))
    prompt = replace(image.prompt, spans=spans)
    assert kept_back and span.length == 6 * length
    parts = image.rows[0]._rows_TW.split(length)
    with running_engine(qwen3_vl_folder, max_num_batched_tokens=length) as engine:
        lost = [TensorRows(part, error=LeaseExpired("lease 1 is over")) for part in parts]

        def send_embeddings(items: list[int]) -> None:
            for item in items:
                handle.set_embeddings(item, TensorRows(parts[item]))

        handle = engine.submit("expired", image.prefix, greedy(8), send_embeddings)
        handle.set_prompt(prompt)
        for item, rows in enumerate(lost):
            handle.set_embeddings(item, rows)
        assert await tokens(handle) == reference.greedy(image.inputs, 8)[0]
        assert [rows.num_releases for rows in lost] == [1] * 6


async def test_embeddings_that_expire_again_and_again_fail_their_request_and_no_other(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        sent: list[TensorRows] = []

        def send_embeddings(items: list[int]) -> None:
            sent.append(TensorRows(torch.zeros(12, 1), error=LeaseExpired("lease 1 is over")))
            expired.set_embeddings(0, sent[-1])

        expired = engine.submit("expired", image.prefix, greedy(8), send_embeddings)
        good = engine.submit("good", image.prefix, greedy(8), unsent)
        expired.set_prompt(image.prompt, announced=())
        good.set_prompt(image.prompt)
        good.set_embeddings(0, image.rows[0])
        with pytest.raises(LeaseExpired, match="lease 1"):
            await collect(expired)
        assert await tokens(good) == reference.greedy(image.inputs, 8)[0]
        assert [rows.num_releases for rows in sent] == [1] * 4


async def test_a_request_whose_embeddings_cannot_be_requested_fails(qwen3_vl_folder: Path, image: Request) -> None:
    """It would wait for them for ever."""

    def send_embeddings(items: list[int]) -> None:
        raise RuntimeError("a bug")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("request", image.prefix, greedy(8), send_embeddings)
        handle.set_prompt(image.prompt, announced=())
        async with asyncio.timeout(10):
            with pytest.raises(InternalError, match="RuntimeError"):
                await collect(handle)
        handle.cancel()
        await until(lambda: is_idle(engine))


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    qwen3_vl_folder: Path, reference: Reference, text: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        decoder = engine._forward_pass.decoder
        forward = decoder.forward

        def fail_once(*arguments: Any) -> torch.Tensor:
            monkeypatch.setattr(decoder, "forward", forward)
            raise RuntimeError("secret detail")

        monkeypatch.setattr(decoder, "forward", fail_once)
        with pytest.raises(InternalError) as caught:
            await collect(submit(engine, text, greedy(4)))
        assert "secret detail" not in str(caught.value)
        assert await tokens(submit(engine, text, greedy(4))) == reference.greedy(text.inputs, 4)[0]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_lost_gpu_is_reported(
    qwen3_vl_folder: Path, text: Request, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(step_executor, "is_lost", lambda device: is_lost)
    reported: list[str] = []
    with running_engine(qwen3_vl_folder, on_gpu_lost=lambda: reported.append("lost")) as engine:
        monkeypatch.setattr(engine._forward_pass.decoder, "forward", fail)
        with pytest.raises(InternalError):
            await collect(submit(engine, text, greedy(4)))
    assert reported == (["lost"] if is_lost else [])


async def test_a_prompt_that_does_not_begin_with_its_prefix_is_an_internal_error(qwen3_vl_folder: Path) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("wrong", [1, 2, 3], greedy(4), unsent)
        handle.set_prompt(ExpandedPrompt([1, 9, 3], torch.arange(3).expand(3, -1), 3))
        with pytest.raises(InternalError):
            await collect(handle)


async def test_close_fails_running_requests_and_releases_their_embeddings(
    qwen3_vl_folder: Path, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("running", image.prefix, greedy(4), unsent)
        handle.set_embeddings(0, image.rows[0])
        await until(lambda: engine.stats().running == 1)
    assert image.rows[0].num_releases == 1
    with pytest.raises(VitrineError, match="shutting down"):
        await collect(handle)


async def test_a_closed_engine_refuses_and_releases(qwen3_vl_folder: Path, image: Request) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        before = engine.submit("before", image.prefix, greedy(4), unsent)
    handle = submit(engine, image, greedy(4))
    assert image.rows[0].num_releases == 1
    for each in (before, handle):
        with pytest.raises(WorkerUnavailable, match="shutting down"):
            await collect(each)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_no_request_waits_for_an_engine_that_broke(
    qwen3_vl_folder: Path, image: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with running_engine(qwen3_vl_folder) as engine:
        running = engine.submit("running", image.prefix, greedy(4), unsent)
        running.set_embeddings(0, image.rows[0])
        await until(lambda: engine.stats().running == 1)
        monkeypatch.setattr(engine._scheduler, "schedule", fail)
        running.set_prompt(image.prompt)
        for handle in (running, engine.submit("later", image.prefix, greedy(4), unsent)):
            with pytest.raises(WorkerUnavailable, match="ended: RuntimeError"):
                await asyncio.wait_for(collect(handle), 10)
        assert image.rows[0].num_releases == 1


async def test_an_exception_of_the_loop_leaves_run_for_the_threads_owner(
    qwen3_vl_folder: Path, image: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with running_engine(qwen3_vl_folder, start=False) as engine:
        monkeypatch.setattr(engine._scheduler, "schedule", fail)
        handle = submit(engine, image, greedy(4))
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.to_thread(engine.run)
        with pytest.raises(WorkerUnavailable, match="ended: RuntimeError"):
            await asyncio.wait_for(collect(handle), 10)
        assert image.rows[0].num_releases == 1 and is_idle(engine)


async def test_fail_all_fails_running_and_later_requests(qwen3_vl_folder: Path, image: Request) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        running = engine.submit("running", image.prefix, greedy(4), unsent)
        running.set_embeddings(0, image.rows[0])
        await until(lambda: engine.stats().running == 1)
        engine.fail_all(Overloaded("the GPU is lost: try again later", retry_after_s=2))
        engine.fail_all(InternalError("only the first error counts"))
        errors = []
        for handle in (running, submit(engine, image, greedy(4))):
            with pytest.raises(Overloaded, match="the GPU is lost") as caught:
                await asyncio.wait_for(collect(handle), 10)
            errors.append(caught.value)
        assert [each.retry_after_s for each in errors] == [2, 2] and errors[0] is not errors[1]
        await until(lambda: is_idle(engine))
        assert (image.rows[0].num_releases, engine._capacity.num_used) == (2, 0)


async def test_what_cannot_be_sampled_fails_alone(
    qwen3_vl_folder: Path, reference: Reference, image: Request, text: Request
) -> None:
    """Embeddings of NaN lead to logits of NaN, in steps, a padded batch and a cache shared with a sound request."""
    num_blocks = -(-(len(text.prompt.token_ids) + 40) // 8) + -(-(len(image.prompt.token_ids) + 8) // 8)
    with running_engine(qwen3_vl_folder, num_blocks=num_blocks) as engine:
        sound = submit(engine, text, greedy(40))
        await anext(aiter(sound))
        broken = replace(image, rows=[TensorRows(torch.full_like(image.rows[0]._rows_TW, torch.nan))])
        greedily = submit(engine, broken, greedy(8))
        expected = reference.greedy(text.inputs, 40)[0]
        assert len(await tokens(greedily)) == 8
        broken = replace(image, rows=[TensorRows(torch.full_like(image.rows[0]._rows_TW, torch.nan))])
        with pytest.raises(InternalError, match="token"):
            await collect(submit(engine, broken, SamplingParams(max_tokens=8)))
        assert await tokens(sound) == expected[1:]
        # NaN that is left in the cache does not reach later requests.
        assert await tokens(submit(engine, text, greedy(40))) == expected


async def test_embeddings_that_were_not_requested_are_released(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        without_span, twice = TensorRows(torch.zeros(1, 1)), TensorRows(torch.zeros(1, 1))
        handle = engine.submit("more rows than spans", image.prefix, greedy(4), unsent)
        handle.set_embeddings(0, image.rows[0])
        handle.set_embeddings(0, twice)
        handle.set_embeddings(7, without_span)
        handle.set_prompt(image.prompt)
        assert await tokens(handle) == reference.greedy(image.inputs, 4)[0]
        assert [each.num_releases for each in (image.rows[0], twice, without_span)] == [1, 1, 1]


async def test_a_seed_may_be_any_integer(qwen3_vl_folder: Path, text: Request) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        for seed in (-1, 2**64, 2**200, -(2**200)):
            assert len(await tokens(submit(engine, text, SamplingParams(max_tokens=2, seed=seed)))) == 2


async def test_an_idle_engine_does_nothing(qwen3_vl_folder: Path, image: Request) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("waits for its image", image.prefix, greedy(4), unsent)
        await until(lambda: engine.stats().running == 1 and engine.stats().num_steps > 0)
        await asyncio.sleep(0.05)
        steps, cpu_s = engine.stats().num_steps, time.process_time()
        await asyncio.sleep(0.5)
        assert engine.stats().num_steps == steps
        assert time.process_time() - cpu_s < 0.25
        handle.cancel()


async def test_seeded_sampling_does_not_depend_on_the_batch(qwen3_vl_folder: Path, text: Request) -> None:
    def ask(engine: Engine, seed: int) -> RequestHandle:
        return submit(engine, text, SamplingParams(max_tokens=24, temperature=1.5, seed=seed))

    with running_engine(qwen3_vl_folder) as engine:
        alone = [await tokens(ask(engine, seed)) for seed in (1, 2)]
        together = await asyncio.gather(*(tokens(ask(engine, seed)) for seed in (3, 1, 2, 4)))
    assert alone[0] != alone[1]
    assert together[1:3] == alone
