"""vLLM preprocesses pictures, Vitrine's encoder computes their embeddings: the tokens are those of vLLM's own tower."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.media import picture
from tests.vllm.checkpoints import CHECKPOINTS, Folders, factor_of
from tests.vllm.fleet import LEASES_GONE_TIMEOUT_S, TRANSPORTS, VllmFleet, abort_all, start_fleet, wait_until_empty
from tests.vllm.questions import Answers, Question, Questions, References, random_questions

NUM_ABORTED = 100
on_both_families = pytest.mark.parametrize("fleet", ["qwen3_vl", "qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, vllm_python: Path, vllm_cache: Path, folders: Folders) -> Iterator[VllmFleet]:
    with start_fleet(vllm_python, folders, request.param, vllm_cache) as fleet:
        yield fleet


@pytest.mark.parametrize("fleet", CHECKPOINTS, indirect=True)
async def test_tokens_equal_transformers(fleet: VllmFleet, questions: Questions, vllm_expected: Answers) -> None:
    """Several pictures, the same one twice, videos, prefill cut inside pictures; 16 requests at a time.

    Those of vLLM's own tower equal transformers', too: `test_own_tower.py`.
    """
    async with fleet.client() as client:
        answers = await client.ask_all(questions[fleet.name])
    assert [answer.error for answer in answers] == [""] * len(answers)
    assert [answer.token_ids for answer in answers] == vllm_expected[fleet.name]
    # None of it is the work of vLLM's own tower.
    num_media = len({item.data for question in questions[fleet.name] for item in question.media})
    assert await fleet.encoder_total("cache_lookups_total", result="miss") >= num_media
    shipped = await fleet.encoder_total("shipped_bytes_total")
    assert await fleet.encoder_total("shipped_bytes_total", transport=TRANSPORTS[fleet.name]) == shipped > 0


@pytest.mark.usefixtures("connector_metrics")
@pytest.mark.parametrize("fleet", CHECKPOINTS, indirect=True)
async def test_all_rows_were_the_encoders(fleet: VllmFleet, questions: Questions) -> None:
    async with fleet.client() as client:
        await client.ask_all(questions[fleet.name])
    num_media = len({item.data for question in questions[fleet.name] for item in question.media})
    assert await fleet.connector_items("delivered") >= num_media
    assert [await fleet.connector_items(outcome) for outcome in ("own_tower", "failed", "cancelled")] == [0, 0, 0]
    received, metrics = "vitrine:connector_received_bytes_total", await fleet.vllm_metrics()
    assert metrics.total(received, transport=TRANSPORTS[fleet.name]) == metrics.total(received) > 0


@on_both_families
async def test_a_prefix_cache_hit_fetches_no_rows(fleet: VllmFleet) -> None:
    factor = factor_of(fleet.folder)
    question = Question((picture(990, 5 * factor, 4 * factor), "The same long question about it, word for word."))
    async with fleet.client() as client:
        before = await fleet.num_items_sent()
        first = await client.ask(question)
        once = await fleet.num_items_sent()
        repeated = await client.ask_all([question] * 8)
    assert await fleet.num_items_sent() == once == before + 1
    assert {tuple(answer.token_ids) for answer in repeated} == {tuple(first.token_ids)}


@on_both_families
async def test_a_picture_of_many_requests_is_encoded_once(fleet: VllmFleet, vllm_references: References) -> None:
    factor = factor_of(fleet.folder)
    same = picture(991, 4 * factor, 6 * factor)
    asked = [Question((f"Question {index} about", same, "please")) for index in range(12)]
    before = await fleet.encoder_total("cache_lookups_total", result="miss")
    async with fleet.client() as client:
        answers = await client.ask_all(asked)
    assert await fleet.encoder_total("cache_lookups_total", result="miss") == before + 1
    assert [answer.token_ids for answer in answers] == [
        question.expected(vllm_references[fleet.name]) for question in asked
    ]


@on_both_families
async def test_aborted_requests_leave_nothing(fleet: VllmFleet, vllm_references: References) -> None:
    """A hundred are aborted at all stages of their life, among others that go on."""
    aborted = random_questions(fleet.folder, NUM_ABORTED, seed=1)
    kept = random_questions(fleet.folder, 8, seed=2)
    shared_memory = fleet.shared_memory()
    cancelled = await fleet.connector_items("cancelled") if fleet.has_metrics else 0
    async with fleet.client() as client:
        answers, _ = await asyncio.gather(client.ask_all(kept), abort_all(client, aborted))
    await wait_until_empty(fleet.leftovers, LEASES_GONE_TIMEOUT_S)
    if fleet.has_metrics:
        assert await fleet.connector_items("cancelled") > cancelled
    assert fleet.shared_memory() == shared_memory
    assert [answer.token_ids for answer in answers] == [
        question.expected(vllm_references[fleet.name]) for question in kept
    ]


@on_both_families
async def test_own_tower_answers_while_the_encoder_is_dead(fleet: VllmFleet, vllm_references: References) -> None:
    asked = random_questions(fleet.folder, 32, seed=3)
    num_shared_files = len(fleet.shared_memory())
    own_tower = await fleet.connector_items("own_tower") if fleet.has_metrics else 0
    num_before = await fleet.num_answers()

    async def waits_for_answers() -> bool:
        return await fleet.num_answers() < num_before + 2

    async with fleet.client() as client:
        asking = asyncio.create_task(client.ask_all(asked, in_flight=4))
        await wait_until_empty(waits_for_answers)
        assert not asking.done()
        fleet.encoder.kill()
        answers = await asking
        assert [answer.error for answer in answers] == [""] * len(answers)
        assert [answer.token_ids for answer in answers] == [
            question.expected(vllm_references[fleet.name]) for question in asked
        ]
        if fleet.has_metrics:
            assert await fleet.connector_items("own_tower") > own_tower

        await asyncio.to_thread(fleet.encoder.restart)
        seeds = itertools.count(5000)

        async def is_not_used_again() -> bool:
            await client.ask(Question((picture(next(seeds), 128, 128), "What?")))
            return await fleet.num_items_sent() == 0

        await wait_until_empty(is_not_used_again)
    await wait_until_empty(fleet.leftovers, LEASES_GONE_TIMEOUT_S)
    assert len(fleet.shared_memory()) == num_shared_files
