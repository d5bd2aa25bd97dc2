"""Several answers in one request, on a real engine; embeddings come from a real encoder server without a tower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pytest

from tests.embedding_transport.clients.encoder_stub import StubServicer, running_stub
from tests.llm_worker.frontend.serving import LocalWorker, identity, serving
from vitrine_vlm.errors import BadRequest, NotAnImage, Overloaded
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationRequest, PromptLogprobs, Started
from vitrine_vlm.llm_worker.generation.several_answers import MAX_ANSWERS, generate_answers
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.types import MediaItem

# The picture does not reach into the prompt's last block.
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>" + "What is in this picture? " * 2
PICTURE = MediaItem("image", data=b"one 40")
DRAWN = SamplingParams(max_tokens=10, temperature=1.5, seed=5)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)


@pytest.fixture
async def stub(qwen3_vl_folder: Path) -> AsyncIterator[tuple[str, StubServicer]]:
    async with running_stub(None, identity(qwen3_vl_folder)) as (address, servicer, _):
        yield address, servicer


@pytest.fixture
async def worker(qwen3_vl_folder: Path, stub: tuple[str, StubServicer]) -> AsyncIterator[LocalWorker]:
    async with serving(qwen3_vl_folder, stub[0]) as worker:
        yield worker


@dataclass
class Answers:
    """The events of one request by answer."""

    started: dict[int, Started] = field(default_factory=dict)
    deltas: dict[int, list[Delta]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[int, Finished] = field(default_factory=dict)

    def token_ids(self) -> list[list[int]]:
        return [[each for delta in self.deltas[answer] for each in delta.token_ids] for answer in sorted(self.deltas)]


async def run(worker: LocalWorker, *prompts: GenerationRequest, n: int = 1, best_of: int = 0) -> Answers:
    found = Answers()
    with LlmMetrics().measure_request() as observe:
        async for answer, event in generate_answers(worker.generator, prompts, n, best_of, observe):
            if isinstance(event, Started):
                assert answer not in found.started and not found.deltas[answer]
                found.started[answer] = event
            elif isinstance(event, Delta):
                found.deltas[answer].append(event)
            elif isinstance(event, Finished):
                assert answer not in found.finished
                found.finished[answer] = event
    assert found.deltas.keys() == found.finished.keys()
    return found


def request(sampling: SamplingParams, prompt: str = PROMPT, *media: MediaItem) -> GenerationRequest:
    return GenerationRequest("request", prompt, media, sampling)


async def test_the_layout_of_a_picture_that_is_not_cached_is_known_from_the_first_answer(
    worker: LocalWorker, stub: tuple[str, StubServicer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of one given by URL."""
    monkeypatch.setattr(worker.layout_cache, "get_all", lambda keys: None)
    answers = await run(worker, request(GREEDY, PROMPT, PICTURE), n=4)
    assert stub[1].num_items == 1
    assert len({tuple(each) for each in answers.token_ids()}) == 1


async def test_the_prompt_is_computed_and_its_picture_encoded_once(
    worker: LocalWorker, stub: tuple[str, StubServicer]
) -> None:
    alone = (await run(worker, request(GREEDY, PROMPT, PICTURE))).token_ids()
    other = replace(PICTURE, data=b"two 40")
    num_encoded = stub[1].num_items
    before = worker.engine.stats()
    answers = await run(worker, request(GREEDY, PROMPT, other), n=4)
    assert stub[1].num_items - num_encoded == 1
    assert list(answers.started) == [0]
    num_prompt = answers.started[0].num_prompt_tokens
    assert len(answers.started[0].prompt_token_ids) == num_prompt
    after = worker.engine.stats()
    assert after.num_prefill_tokens - before.num_prefill_tokens <= num_prompt + 3 * 16
    assert [answers.finished[each].num_cached_tokens for each in range(1, 4)] == [(num_prompt - 1) // 16 * 16] * 3
    assert len({tuple(each) for each in answers.token_ids()}) == 1
    assert (await run(worker, request(GREEDY, PROMPT, PICTURE), n=2)).token_ids() == alone * 2
    await worker.until_idle()


async def test_each_answer_draws_with_a_seed_of_its_own(worker: LocalWorker) -> None:
    asked = request(DRAWN, "Hello " * 8)
    one_by_one = [
        (await run(worker, replace(asked, sampling=replace(DRAWN, seed=5 + index)))).token_ids()[0]
        for index in range(3)
    ]
    assert (await run(worker, asked, n=3)).token_ids() == one_by_one
    assert len({tuple(each) for each in one_by_one}) == 3
    without = await run(worker, replace(asked, sampling=replace(DRAWN, seed=None)), n=3)
    assert len({tuple(each) for each in without.token_ids()}) == 3
    of_one_token = await run(worker, replace(asked, sampling=replace(DRAWN, max_tokens=1)), n=3)
    assert of_one_token.token_ids() == [each[:1] for each in one_by_one]


async def test_answers_to_several_prompts_are_in_their_order(worker: LocalWorker) -> None:
    prompts = [request(DRAWN, text) for text in ("One", "Two and more", "Three")]
    expected = [each for prompt in prompts for each in (await run(worker, prompt, n=2)).token_ids()]
    together = await run(worker, *prompts, n=2)
    assert together.token_ids() == expected
    assert {answer: each.num_prompt_tokens for answer, each in together.started.items()} == {0: 3, 2: 12, 4: 5}
    await worker.until_idle()


async def test_best_of_returns_the_most_probable_ones(worker: LocalWorker) -> None:
    asked = request(replace(DRAWN, logprobs=0), "Hello")
    every = await run(worker, asked, n=5)
    means = {
        answer: fmean(each.logprob for delta in deltas for each in delta.logprobs)
        for answer, deltas in every.deltas.items()
    }
    best = sorted(means, key=lambda answer: -means[answer])[:2]
    returned = await run(worker, asked, n=2, best_of=5)
    assert returned.token_ids() == [every.token_ids()[answer] for answer in best]
    assert list(returned.started) == [0]
    assert [len(each.logprobs) for (each,) in returned.deltas.values()] == [10, 10]
    without = await run(worker, replace(asked, sampling=DRAWN), n=2, best_of=5)
    assert without.token_ids() == returned.token_ids()
    assert all(not each.logprobs for (each,) in without.deltas.values())
    assert [each.text for (each,) in without.deltas.values()] == [
        "".join(delta.text for delta in every.deltas[answer]) for answer in best
    ]


async def test_log_probabilities_of_the_prompt_come_once(worker: LocalWorker) -> None:
    asked = request(replace(GREEDY, prompt_logprobs=1), "Hello " * 8)
    for n, best_of in ((1, 1), (3, 3), (2, 3)):
        found: list[tuple[int, PromptLogprobs]] = []
        with LlmMetrics().measure_request() as observe:
            async for answer, event in generate_answers(worker.generator, [asked, asked], n, best_of, observe):
                if isinstance(event, PromptLogprobs):
                    found.append((answer, event))
        assert [answer for answer, _ in found] == [0, n]
        for _, event in found:
            first, *others = event.logprobs
            assert first is None and len(others) == 47 and all(each is not None for each in others)


async def test_closing_ends_all_answers(worker: LocalWorker) -> None:
    asked = request(replace(GREEDY, max_tokens=400), "Hello")
    with LlmMetrics().measure_request() as observe:
        async with aclosing(generate_answers(worker.generator, [asked, asked], 3, 0, observe)) as events:
            seen = set()
            async for answer, _ in events:
                seen.add(answer)
                if len(seen) == 6:
                    break
    await worker.until_idle()


async def test_one_that_fails_ends_the_others(worker: LocalWorker) -> None:
    long = request(replace(GREEDY, max_tokens=400), "Hello")
    with pytest.raises(NotAnImage):
        await run(worker, long, request(GREEDY, PROMPT, MediaItem("image", data=b"bad 3")), n=2)
    await worker.until_idle()


@pytest.mark.parametrize(
    ("num_prompts", "n", "best_of", "param"),
    [(1, MAX_ANSWERS + 1, 0, "n"), (1, 3, 2, "best_of"), (1, 1, MAX_ANSWERS + 1, "best_of"), (65, 2, 0, None)],
)
async def test_numbers_out_of_range(
    worker: LocalWorker, num_prompts: int, n: int, best_of: int, param: str | None
) -> None:
    with pytest.raises(BadRequest) as refused:
        await run(worker, *[request(GREEDY, "Hello")] * num_prompts, n=n, best_of=best_of)
    assert refused.value.param == param


async def test_more_answers_than_the_engine_can_hold_are_refused_at_once(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine._capacity, "_limit", 3)
    with pytest.raises(Overloaded):
        await run(worker, request(GREEDY, "Hello"), n=4)
    assert worker.engine.stats().num_steps == 0
    assert len((await run(worker, request(GREEDY, "Hello"), n=3)).finished) == 3


async def test_metrics_are_of_all_answers(worker: LocalWorker) -> None:
    metrics = LlmMetrics()
    with metrics.measure_request() as observe:
        async for _ in generate_answers(worker.generator, [request(GREEDY, "Hello")], 3, 0, observe):
            pass
    value = metrics.registry.get_sample_value
    assert value("vitrine_llm_requests_total", {"outcome": "ok"}) == 1
    assert value("vitrine_llm_tokens_total", {"kind": "prompt"}) == 5
    assert value("vitrine_llm_tokens_total", {"kind": "generated"}) == 30
    assert value("vitrine_llm_ttft_seconds_count") == 3
    assert value("vitrine_llm_itl_seconds_count") == 27
