"""Prompts on one worker, answers on another: the same tokens, and nothing lost or left behind when one disconnects."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tests.integration.fleet import TRANSPORTS, Fleet, ServiceProcess
from tests.integration.media_server import MediaServer, serve_media
from tests.integration.split import LEASE_TTL_S, Split, decode_worker, prefill_worker, start_split
from tests.integration.test_parity import CASES
from tests.integration.test_worker_process import base_url, metric, post, until_metric
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint
from vitrine_vlm.sample_models.reference import Reference

NUM_TOKENS = 32

one_family = pytest.mark.parametrize("checkpoint_folder", ["qwen3_vl"], indirect=True)


@pytest.fixture(scope="module")
def split(checkpoint_folder: Path) -> Iterator[Split]:
    """Its encoder may fetch from loopback."""
    with start_split(checkpoint_folder, encoder_flags=["--allow-private-addresses"]) as split:
        yield split


@pytest.fixture
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


def text_request(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    return {"model": fleet.folder.name, "prompt": "The quick brown fox", "temperature": 0, "max_tokens": 8, **fields}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["text_only", "image_and_video", "long_with_image_across_chunks"])
async def test_greedy_tokens_equal_transformers(split: Split, reference: Reference, name: str, transport: str) -> None:
    case = CASES[name]
    async with split.decoding.connected() as fleet:
        media = case.media(fleet.factor)
        expected_ids, expected_logprobs = reference.greedy(reference.inputs(case.text, media), NUM_TOKENS)
        generated = await fleet.worker(transport).generate(case.text, media, NUM_TOKENS, logprobs=0)
    assert generated.token_ids == expected_ids
    for step, each in enumerate(generated.logprobs):
        assert each.sampled.logprob == pytest.approx(float(expected_logprobs[step, expected_ids[step]]), abs=1e-3)
    assert generated.started.num_prompt_tokens == generated.finished.num_prompt_tokens
    if media and not generated.finished.num_cached_tokens:  # else its media were not looked at again
        assert generated.finished.timings.load_ms > 0
    assert generated.finished.timings.prefill_ms > 0
    process = split.decoding.worker_processes[transport]
    # Nothing of the prompt was computed here.
    assert await metric(process, 'vitrine_llm_computed_tokens_total{phase="prefill"}') == 0
    assert await metric(process, f'vitrine_llm_kv_received_bytes_total{{transport="{transport}"}}') > 0


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@one_family
async def test_seeds_stop_strings_and_usage_are_as_on_one_worker(split: Split, transport: str) -> None:
    """The prefill worker answers users, too, all by itself."""
    one, decoding = split.prefill_workers[0], split.decoding.worker_processes[transport]
    for fields in (
        {"temperature": 1.2, "seed": 11, "max_tokens": 24, "ignore_eos": True},
        {"logprobs": 2, "max_tokens": 12, "ignore_eos": True},
        {"max_tokens": 1},
        {"temperature": 1.2, "seed": 5, "max_tokens": 48, "guided_regex": "[a-f]{3}( [0-9]{2}){1,4}"},
        {"temperature": 1.2, "seed": 6, "max_tokens": 48, "guided_choice": ["a", "z"]},  # the first token is the last
    ):
        request = text_request(split.decoding, **fields)
        (_, expected, _), (status, answer, _) = (
            await post(one, "/v1/completions", request),
            await post(decoding, "/v1/completions", request),
        )
        assert status == 200
        assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
        assert answer["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
        assert answer["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
        if "logprobs" in fields:
            ours, theirs = (each["choices"][0]["logprobs"] for each in (answer, expected))
            assert ours["tokens"] == theirs["tokens"]
            assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)

    whole = (await post(decoding, "/v1/completions", text_request(split.decoding, max_tokens=24)))[1]
    text = whole["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    stopped = (await post(decoding, "/v1/completions", text_request(split.decoding, max_tokens=24, stop=stop)))[1]
    assert stopped["choices"][0]["text"] == text[: text.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"


@one_family
async def test_several_answers_with_penalties_are_as_on_one_worker(split: Split) -> None:
    """The prompt's KV is sent once, and that of its last block for the further answers."""
    case, prefilling = CASES["one_image"], split.prefill_workers[0]
    (picture,) = case.media(split.decoding.factor)
    item = llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, data=picture.data)
    sampling = llm_pb2.SamplingParams(
        max_tokens=16,
        temperature=1.2,
        seed=3,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        min_p=0.01,
        min_tokens=16,
        bad_words=[llm_pb2.TokenIds(ids=[5, 6])],
    )
    request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text=case.text, media=[item]), sampling=sampling, n=3)
    shipped = 'vitrine_llm_kv_shipped_bytes_total{transport="shm"}'
    answers: list[dict[int, list[int]]] = []
    num_prompt_tokens, before = 0, await metric(prefilling, shipped)
    for process in (prefilling, split.decoding.worker_processes["shm"]):
        answers.append({})
        async with grpc.aio.insecure_channel(process.addresses["grpc"]) as channel:
            async for response in llm_pb2_grpc.LlmStub(channel).Generate(request):
                answers[-1].setdefault(response.answer, []).extend(response.delta.token_ids)
                num_prompt_tokens = max(num_prompt_tokens, response.started.num_prompt_tokens)
    assert answers[0] == answers[1]
    assert len({tuple(each) for each in answers[0].values()}) == 3
    config = json.loads((split.decoding.folder / "config.json").read_text())["text_config"]
    token_nbytes = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    assert await metric(prefilling, shipped) - before <= (num_prompt_tokens + 2 * 16) * token_nbytes


@one_family
async def test_one_token_needs_no_kv(split: Split) -> None:
    shipped = 'vitrine_llm_kv_shipped_bytes_total{transport="shm"}'
    before = await metric(split.prefill_workers[0], shipped)
    request = text_request(split.decoding, max_tokens=1)
    assert (await post(split.decoding.worker_processes["shm"], "/v1/completions", request))[0] == 200
    assert await metric(split.prefill_workers[0], shipped) == before


@one_family
async def test_a_prompt_that_comes_again_is_not_computed_again(split: Split) -> None:
    decoding, prefilling = split.decoding.worker_processes["shm"], split.prefill_workers[0]
    computed = 'vitrine_llm_computed_tokens_total{phase="prefill"}'
    shipped = 'vitrine_llm_kv_shipped_bytes_total{transport="shm"}'
    request = text_request(split.decoding, prompt="Once upon a time there was a worker that knew " * 3)
    before = await metric(prefilling, shipped)
    first = (await post(decoding, "/v1/completions", request))[1]
    between, shipped_first = await metric(prefilling, computed), await metric(prefilling, shipped) - before
    again = (await post(decoding, "/v1/completions", request))[1]
    assert again["choices"] == first["choices"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] - 16
    assert await metric(prefilling, computed) - between == again["usage"]["prompt_tokens"] - cached
    # Nor is its KV sent again, as far as it fills blocks.
    assert await metric(prefilling, shipped) - before - shipped_first <= shipped_first * 16 / cached
    # Neither of the two workers uses it for a request with a salt.
    between = await metric(prefilling, computed)
    salted = (await post(decoding, "/v1/completions", {**request, "cache_salt": "red"}))[1]
    assert salted["choices"][0]["text"] == first["choices"][0]["text"]
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert await metric(prefilling, computed) - between == salted["usage"]["prompt_tokens"]


@one_family
async def test_a_picture_that_comes_again_is_known_before_its_kv_is_asked_for(split: Split) -> None:
    prefilling, shipped = split.prefill_workers[0], 'vitrine_llm_kv_shipped_bytes_total{transport="shm"}'
    case = CASES["one_image"]
    async with split.decoding.connected() as fleet:
        media, worker = case.media(fleet.factor), fleet.worker("shm")
        text = f"{case.text} Of this prompt no test in front of this one has KV."
        before = await metric(prefilling, shipped)
        first = await worker.generate(text, media, NUM_TOKENS)
        between = await metric(prefilling, shipped)
        again = await worker.generate(text, media, NUM_TOKENS)
    assert again.token_ids == first.token_ids
    num_tokens = first.started.num_prompt_tokens
    assert await metric(prefilling, shipped) - between <= (between - before) * 16 / num_tokens


@one_family
async def test_a_client_that_goes_away_frees_everything_on_both(split: Split, media_server: MediaServer) -> None:
    decoding, prefilling = split.decoding.worker_processes["shm"], split.prefill_workers[0]
    # While it decodes.
    body = text_request(split.decoding, max_tokens=3000, ignore_eos=True, stream=True)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{base_url(decoding)}/v1/completions", json=body) as response,
    ):
        await response.content.readuntil(b"\n\n")
        assert await metric(decoding, "vitrine_llm_running") == 1
    # And while its picture is on its way, to the prefill worker's encoder.
    async with grpc.aio.insecure_channel(decoding.addresses["grpc"]) as channel:
        item = llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, url=media_server.url("/hangs.png"))
        prompt = llm_pb2.Prompt(text=CASES["one_image"].text, media=[item])
        call = llm_pb2_grpc.LlmStub(channel).Generate(llm_pb2.GenerateRequest(prompt=prompt))
        async with asyncio.timeout(20):
            await media_server.num_waiting.acquire()
        await until_metric(prefilling, "vitrine_llm_running", 1)
        call.cancel()
    for process in (decoding, prefilling):
        await until_metric(process, "vitrine_llm_running", 0)
        await until_metric(process, "vitrine_llm_kv_blocks_used", 0)
    await until_metric(prefilling, "vitrine_llm_kv_leases_live", 0, LEASE_TTL_S + 15)


@one_family
async def test_the_page_of_a_decode_worker_shows_its_prefill_workers(split: Split) -> None:
    url = f"{base_url(split.decoding.worker_processes['grpc'])}/dashboard/data"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        shown = await response.json()
    assert shown["fleet"] == "prefill workers"
    (worker,) = shown["encoders"]
    assert (worker["address"], worker["transport"]) == (split.prefill_workers[0].addresses["grpc"], "grpc")
    assert shown["client"]["requests"] >= 0


@one_family
async def test_a_bad_request_is_the_clients_fault(split: Split) -> None:
    decoding = split.decoding.worker_processes["grpc"]
    request = {
        "model": split.decoding.folder.name,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,AAAA"}}]}],
    }
    status, answer, _ = await post(decoding, "/v1/chat/completions", request)
    assert (status, answer["error"]["code"]) == (400, "not_an_image"), answer


async def test_short_of_memory_it_still_answers_alike(qwen3_vl_folder: Path) -> None:
    """A preempted request has its prompt prefilled again, and continues."""
    reference = Reference(qwen3_vl_folder)
    prompts = [f"{word} and then some more words" for word in ("apples", "pears", "plums", "cherries")]
    expected = [reference.greedy(reference.inputs(prompt, []), NUM_TOKENS)[0] for prompt in prompts]
    flags = ["--kv-cache-tokens", "144", "--no-prefix-cache"]
    with start_split(qwen3_vl_folder, transports=["shm"], decode_flags=flags) as split:
        async with split.decoding.connected() as fleet:
            worker = fleet.worker("shm")
            answers = await asyncio.gather(*(worker.generate(prompt, [], NUM_TOKENS) for prompt in prompts))
        process = split.decoding.worker_processes["shm"]
        assert [each.token_ids for each in answers] == expected
        assert await metric(process, "vitrine_llm_preemptions_total") > 0
        assert await metric(process, "vitrine_llm_prefill_requests_total") > len(prompts)
        await until_metric(split.prefill_workers[0], "vitrine_llm_kv_leases_live", 0)


async def test_a_killed_prefill_worker_loses_no_request(qwen3_vl_folder: Path) -> None:
    with start_split(qwen3_vl_folder, transports=["shm"], num_prefill_workers=2) as split:
        decoding = split.decoding.worker_processes["shm"]
        asking = []
        for index in range(40):
            body = text_request(split.decoding, prompt=f"{index} is a number " * 12, max_tokens=16, ignore_eos=True)
            asking.append(asyncio.create_task(post(decoding, "/v1/completions", body)))
            if index == 15:
                while await metric(split.prefill_workers[0], "vitrine_llm_kv_sessions") != 1:
                    await asyncio.sleep(0.01)
                split.prefill_workers[0].process.send_signal(signal.SIGKILL)
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(*asking)
        assert [status for status, _, _ in answers] == [200] * len(asking), answers
        assert {answer["usage"]["completion_tokens"] for _, answer, _ in answers} == {16}
        assert await metric(decoding, "vitrine_llm_prefill_retries_total") > 0

        # The last one ends as it should, and is missed.
        assert await asyncio.to_thread(split.prefill_workers[1].stop) == 0
        status, answer, _ = await post(decoding, "/v1/completions", text_request(split.decoding))
        assert (status, answer["error"]["code"]) == (503, "prefill_unavailable")
        assert split.prefill_workers[1].addresses["grpc"] in answer["error"]["message"]
        async with aiohttp.ClientSession() as session, session.get(f"{base_url(decoding)}/ready") as response:
            assert response.status == 503
            assert len((await response.json())["prefill_workers"]) == 2


async def test_a_prefill_worker_of_another_checkpoint_is_refused(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    """Same name, same dims, other weights: only the revision differs."""
    other = save_random_checkpoint(tmp_path / qwen3_vl_folder.name, "qwen3_vl", seed=1)
    processes: list[ServiceProcess] = [prefill_worker(other, "127.0.0.1:9")]
    try:
        address = processes[0].wait_serving()["grpc"]
        processes.append(decode_worker(qwen3_vl_folder, address, "shm"))
        processes[1].wait_serving()
        status, answer, _ = await post(
            processes[1], "/v1/completions", {"model": qwen3_vl_folder.name, "prompt": "Hello", "max_tokens": 4}
        )
        assert (status, answer["error"]["code"]) == (503, "prefill_unavailable")
        assert "another revision" in answer["error"]["message"]
        async with aiohttp.ClientSession() as session, session.get(f"{base_url(processes[1])}/ready") as response:
            assert response.status == 503
    finally:
        for process in processes:
            process.stop()
