"""Sampling parameters over HTTP: each does what it says, and a value out of range is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.llm_worker.frontend.http_client import Client, body, client_of
from tests.llm_worker.frontend.serving import LocalWorker

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]


async def tokens(client: Client, worker: LocalWorker, **fields: Any) -> list[int]:
    asked = body(worker, return_token_ids=True, ignore_eos=True, **fields)
    answer = await (await client.post("/v1/chat/completions", json=asked)).json()
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


async def test_tokens_may_be_allowed_favoured_and_forbidden(client: Client, worker: LocalWorker) -> None:
    assert await tokens(client, worker, allowed_token_ids=[5]) == [5] * 8
    assert await tokens(client, worker, logit_bias={"7": 100}) == [7] * 8
    assert await tokens(client, worker, logit_bias={"7": 100}, allowed_token_ids=[5, 6, 7]) == [7] * 8
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    first = (await tokens(client, worker))[0]
    assert first not in await tokens(client, worker, bad_words=[tokenizer.text_of(first)])


async def test_penalties_count_what_is_there(client: Client, worker: LocalWorker) -> None:
    # At the third token 6 is nearly as probable: what the first two 5s cost decides.
    both: dict[str, Any] = {"allowed_token_ids": [5, 6], "logit_bias": {"5": 15}}
    assert await tokens(client, worker, **both) == [5] * 8
    assert (await tokens(client, worker, **both, frequency_penalty=1))[:3] == [5, 5, 6]
    assert (await tokens(client, worker, **both, presence_penalty=2))[:3] == [5, 5, 6]
    biased = {"logit_bias": {"5": 100, "6": 80}}
    assert await tokens(client, worker, **biased) == [5] * 8
    assert set((await tokens(client, worker, **biased, repetition_penalty=2))[:2]) == {5, 6}


async def test_min_p_keeps_the_most_probable_and_min_tokens_delays_the_end(client: Client, worker: LocalWorker) -> None:
    greedy = await tokens(client, worker)
    assert await tokens(client, worker, temperature=2, min_p=1) == greedy
    stop = {"stop_token_ids": [greedy[0]]}
    assert len(await tokens(client, worker, **stop)) == 1
    assert len(await tokens(client, worker, **stop, min_tokens=5)) >= 5


async def test_the_checkpoints_penalty_counts_unless_the_request_has_one(worker: LocalWorker) -> None:
    defaults = replace(worker.served.defaults, repetition_penalty=2.0)
    async with client_of(worker.served) as plain, client_of(replace(worker.served, defaults=defaults)) as penal:
        expected = await tokens(plain, worker, repetition_penalty=2.0)
        assert await tokens(penal, worker) == expected != await tokens(plain, worker)
        assert await tokens(penal, worker, repetition_penalty=1.0) == await tokens(plain, worker)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 1.5},
        {"min_tokens": -1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": 99},
        {"repetition_penalty": 0},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"1000000": 1}},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 129},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [1000000]},
    ],
    ids=str,
)
async def test_values_out_of_range_are_named(
    client: Client, worker: LocalWorker, route: str, stream: bool, fields: dict[str, Any]
) -> None:
    texts: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {"prompt": "Hi"},
        "/v1/responses": {"input": "Hi"},
    }
    asked = {"model": worker.served.name, **texts[route], "stream": stream, **fields}
    response = await client.post(route, json=asked)
    error = (await response.json())["error"]
    assert (response.status, error["param"], error["code"]) == (400, next(iter(fields)), "invalid_request")


async def test_a_broken_data_url_is_named_by_its_place(client: Client, worker: LocalWorker) -> None:
    for payload in ("@@@", "猫"):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]
        response = await client.post("/v1/chat/completions", json=body(worker, messages=messages))
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, "messages.0.content.1.image_url.url")
