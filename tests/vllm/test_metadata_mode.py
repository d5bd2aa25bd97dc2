"""A gateway in front of vLLM: vLLM gets the sizes of pictures alone, has no tower, and gives the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.media import clip, picture
from tests.vllm.checkpoints import CHECKPOINTS, Folders, factor_of
from tests.vllm.fleet import (
    LEASES_GONE_TIMEOUT_S,
    TENANT_HEADER,
    TRANSPORTS,
    VllmFleet,
    abort_all,
    start_fleet_with_gateway,
    wait_until_empty,
)
from tests.vllm.questions import Answers, Question, Questions, References, random_questions
from tests.vllm.server import Answer, Client
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.sample_models.reference import Reference
from vitrine_vlm.types import Layout, MediaItem

NUM_ABORTED = 100
on_both_families = pytest.mark.parametrize("fleet", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
on_one_family = pytest.mark.parametrize("fleet", ["qwen3_vl"], indirect=True)


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, vllm_python: Path, vllm_cache: Path, folders: Folders) -> Iterator[VllmFleet]:
    with start_fleet_with_gateway(vllm_python, folders, request.param, vllm_cache) as fleet:
        yield fleet


@pytest.mark.parametrize("fleet", CHECKPOINTS, indirect=True)
async def test_tokens_equal_transformers(fleet: VllmFleet, questions: Questions, expected: Answers) -> None:
    """Several pictures, the same one twice, videos, prefill cut inside pictures; 16 requests at a time.

    Those of vLLM's own tower equal transformers', too: `test_own_tower.py`.
    """
    async with fleet.client() as client:
        answers = await client.ask_all(questions[fleet.name])
    assert [answer.error for answer in answers] == [""] * len(answers)
    assert [answer.token_ids for answer in answers] == expected[fleet.name]
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
async def test_vllm_has_no_tower(fleet: VllmFleet) -> None:
    async with fleet.vllm_client() as client:
        answer = await client.ask(Question((picture(980, 128, 96), "What?")))
    assert answer.status == 400


@on_both_families
async def test_a_prefix_cache_hit_fetches_no_rows(fleet: VllmFleet) -> None:
    factor = factor_of(fleet.folder)
    question = Question((picture(990, 5 * factor, 4 * factor), "The same long question about it, word for word."))
    async with fleet.client() as client:
        before = await fleet.num_items_sent()
        first = await client.ask(question)
        sent = await fleet.num_items_sent()
        computed = await fleet.encoder_total("batch_items_count")
        repeated = await client.ask_all([question] * 8)
    assert await fleet.num_items_sent() == sent == before + 1
    assert await fleet.encoder_total("batch_items_count") == computed
    assert {tuple(answer.token_ids) for answer in repeated} == {tuple(first.token_ids)}


@on_one_family
async def test_tenants_share_no_rows(fleet: VllmFleet, references: References) -> None:
    factor = factor_of(fleet.folder)
    question = Question((picture(992, 5 * factor, 4 * factor), "The same long question about it, word for word."))
    misses = await fleet.encoder_total("cache_lookups_total", result="miss")
    sent = await fleet.num_items_sent()
    async with fleet.client() as client:
        for tenants_seen, tenant in ((1, "red"), (2, "blue"), (2, "red"), (2, "blue")):
            answer = await client.ask(question, headers={TENANT_HEADER: tenant})
            assert answer.token_ids == question.expected(references[fleet.name])
            assert await fleet.num_items_sent() == sent + tenants_seen
            assert await fleet.encoder_total("cache_lookups_total", result="miss") == misses + tenants_seen


@on_one_family
async def test_preempted_requests_are_computed_again(fleet: VllmFleet, references: References) -> None:
    """With the same tokens, whether or not their blocks have been used by other requests meanwhile."""
    num_tokens = 128
    factor = factor_of(fleet.folder)
    sizes = [(3 + index % 4, 3 + index // 4) for index in range(16)]
    pictures = [picture(930 + index, w * factor, h * factor) for index, (w, h) in enumerate(sizes)]
    asked = [Question((each, f"Question {index} is about it.")) for index, each in enumerate(pictures)]
    preempted = (await fleet.vllm_metrics()).total("vllm:num_preemptions_total")
    async with fleet.client() as client:
        asking = (client.ask(question, max_tokens=num_tokens, ignore_eos=True) for question in asked)
        answers = await asyncio.gather(*asking)
    assert (await fleet.vllm_metrics()).total("vllm:num_preemptions_total") > preempted
    assert [answer.error for answer in answers] == [""] * len(answers)
    for answer, question in zip(answers, asked, strict=True):
        expected = question.expected(references[fleet.name], num_tokens)  # up to an end token
        assert answer.token_ids[: len(expected)] == expected
    await wait_until_empty(fleet.leftovers, LEASES_GONE_TIMEOUT_S)


@on_both_families
async def test_options_of_the_request_reach_the_encoder_and_no_cache_mixes_them_up(fleet: VllmFleet) -> None:
    factor = factor_of(fleet.folder)
    question = Question((picture(994, 6 * factor, 5 * factor), "What is it?"))
    bounds = {"min_pixels": factor**2, "max_pixels": 7 * factor**2}
    small = Reference(fleet.folder)
    small.image_processor.size = {"shortest_edge": bounds["min_pixels"], "longest_edge": bounds["max_pixels"]}
    expected = [question.expected(Reference(fleet.folder)), question.expected(small)]
    assert expected[0] != expected[1]
    async with fleet.client() as client:
        for _ in range(2):
            whole = await client.ask(question)
            sized = await client.ask(question, mm_processor_kwargs=bounds)
            again = await client.ask(question, mm_processor_kwargs={}, media_io_kwargs={"video": {"num_frames": -1}})
            assert [each.error for each in (whole, sized, again)] == [""] * 3
            assert [whole.token_ids, sized.token_ids, again.token_ids] == [*expected, expected[0]]


@on_both_families
async def test_aborted_requests_leave_nothing(fleet: VllmFleet, references: References) -> None:
    """A hundred are aborted at all stages of their life, among others that go on."""
    aborted = random_questions(fleet.folder, NUM_ABORTED, seed=1)
    kept = random_questions(fleet.folder, 8, seed=2)
    shared_memory = fleet.shared_memory()
    async with fleet.client() as client:
        answers, _ = await asyncio.gather(client.ask_all(kept), abort_all(client, aborted))
    await wait_until_empty(fleet.leftovers, LEASES_GONE_TIMEOUT_S)
    assert fleet.shared_memory() == shared_memory
    assert [answer.token_ids for answer in answers] == [question.expected(references[fleet.name]) for question in kept]


@on_both_families
async def test_a_dead_encoder_fails_its_requests_and_a_new_one_serves(fleet: VllmFleet, references: References) -> None:
    asked = random_questions(fleet.folder, 32, seed=3)
    after = random_questions(fleet.folder, 8, seed=4)
    num_before = await fleet.num_answers()

    async def waits_for_answers() -> bool:
        return await fleet.num_answers() < num_before + 2

    async with fleet.client() as client:
        asking = asyncio.create_task(client.ask_all(asked, in_flight=4))
        await wait_until_empty(waits_for_answers)
        fleet.encoder.kill()
        answers = await asking
        right = [answer.status == 200 for answer in answers]
        for answer, question in zip(answers, asked, strict=True):
            assert answer.token_ids == (question.expected(references[fleet.name]) if answer.status == 200 else [])
        assert any(right) and not all(right)
        assert fleet.vllm.healthy()

        await asyncio.to_thread(fleet.encoder.restart)

        async def fails() -> str:
            return (await client.ask(after[0])).error

        await wait_until_empty(fails)
        answers = await client.ask_all(after)
    assert [answer.token_ids for answer in answers] == [question.expected(references[fleet.name]) for question in after]
    await wait_until_empty(fleet.leftovers, LEASES_GONE_TIMEOUT_S)


class Measured:
    """A picture that an encoder has measured, as a gateway describes it to vLLM."""

    def __init__(self, layout: Layout) -> None:
        assert layout.ticket is not None
        self.grid_thw = list(layout.grid_thw)
        # Of this test alone: vLLM 0.30 takes the grid that it has seen under a uuid before, whatever the request says.
        self.uuid = uuid4().hex
        self.params = {
            "ticket": layout.ticket.value.hex(),
            "encoder_id": layout.ticket.encoder_id,
            "kind": "image",
            "num_tokens": layout.num_tokens,
        }

    async def ask(self, client: Client) -> Answer:
        part = {"type": "image_embeds", "image_embeds": {"image_grid_thw": self.grid_thw}, "uuid": self.uuid}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        params = {self.uuid: self.params} if self.params else None
        return await client.ask(Question(()), messages=messages, ec_transfer_params=params)


@pytest.fixture
async def measured(fleet: VllmFleet) -> AsyncIterator[list[tuple[Question, Measured]]]:
    """Five pictures, the last one larger than the others, the question about each, and what vLLM is to be asked."""
    factor = factor_of(fleet.folder)
    pictures = [picture(seed, 5 * factor, 4 * factor) for seed in range(970, 974)]
    pictures.append(picture(974, 6 * factor, 6 * factor))
    client = EncoderClient([fleet.encoder.address], None, shm_folder=fleet.shm_folder)
    await client.start()
    layouts = {}
    async for event in client.layouts([MediaItem("image", data=each.data) for each in pictures], "measured"):
        layouts[event.item_index] = event.layout
    questions = [Question((each, "What is this?")) for each in pictures]
    yield [(question, Measured(layouts[index])) for index, question in enumerate(questions)]
    await client.release_tickets([layout.ticket for layout in layouts.values() if layout.ticket is not None])
    await client.close()


@on_one_family
async def test_requests_whose_rows_cannot_come_fail_alone(
    fleet: VllmFleet, references: References, measured: list[tuple[Question, Measured]]
) -> None:
    """Of five requests at the same time, four fail, and the fifth has the right tokens."""
    (_, wrong_grid), (_, unknown_ticket), (_, unknown_encoder), (_, without_ticket), (question, _) = measured
    wrong_grid.grid_thw = [1, 12, 12]
    unknown_ticket.params["ticket"] = "0" * 32
    unknown_encoder.params["encoder_id"] = "another"
    without_ticket.params = {}
    async with fleet.vllm_client() as client:
        *failed, right = await asyncio.gather(*(each.ask(client) for _, each in measured))
    assert [answer.status for answer in failed] == [500] * 4
    assert right.token_ids == question.expected(references[fleet.name])
    assert fleet.vllm.healthy()


@on_one_family
async def test_one_uuid_for_pictures_of_two_sizes_fails_the_second_request_alone(
    fleet: VllmFleet, measured: list[tuple[Question, Measured]]
) -> None:
    """vLLM's encoder cache has the rows of the first one under it, which are too few."""
    (_, first), (_, other), *_, (_, larger) = measured
    larger.uuid = first.uuid
    async with fleet.vllm_client() as client:
        answers = [await each.ask(client) for each in (first, larger, other)]
    assert [answer.status for answer in answers] == [200, 500, 200]


@on_both_families
async def test_grids_that_vllm_cannot_position_fail_alone(
    fleet: VllmFleet, measured: list[tuple[Question, Measured]]
) -> None:
    """They have as many patches as the ticket's [1, 8, 10], so that nothing else refuses them."""
    grids = ([2, 4, 10], [1, 5, 16], [1, -8, -10], [1, 1, 80])
    async with fleet.vllm_client() as client:
        for (_, picture), grid in zip(measured, grids, strict=False):
            assert picture.grid_thw == [1, 8, 10]
            picture.grid_thw = grid
            assert (await picture.ask(client)).status == 500
        (_, right) = measured[-1]
        assert (await right.ask(client)).status == 200


@pytest.mark.parametrize("fleet", ["qwen2_5_vl"], indirect=True)
async def test_videos_have_the_positions_of_their_times(fleet: VllmFleet, references: References) -> None:
    """Of 8 frames a second every fourth is sampled, but their number is even: the intervals are 0.8 to 1.3 s."""
    factor = factor_of(fleet.folder)
    lengths = (9, 13, 17, 20, 22, 27)
    clips = [clip(960 + length, 3 * factor, 4 * factor, num_frames=length) for length in lengths]
    asked = [Question((each, "Then", picture(950, 3 * factor, 3 * factor), "Tell what happens.")) for each in clips]
    async with fleet.client() as client:
        answers = await client.ask_all(asked)
    assert [answer.token_ids for answer in answers] == [question.expected(references[fleet.name]) for question in asked]


@pytest.mark.parametrize("fleet", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("interval_s", [[1e9], [-1.0], [1.0, 1.0], None])
async def test_times_of_videos_that_vllm_cannot_position_are_refused(
    fleet: VllmFleet, interval_s: list[float] | None
) -> None:
    """Positions beyond vLLM's table would end its engine."""
    metadata = {"video_grid_thw": [2, 4, 4]} | ({} if interval_s is None else {"second_per_grid_ts": interval_s})
    part = {"type": "video_embeds", "video_embeds": metadata, "uuid": "a"}
    async with fleet.vllm_client() as client:
        answer = await client.ask(Question(()), messages=[{"role": "user", "content": [part]}])
    assert answer.status == 400
    assert "second_per_grid_ts" in answer.error
