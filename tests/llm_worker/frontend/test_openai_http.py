"""The HTTP port in this process: before and after the model is loaded, its refusals, and its answers."""

from __future__ import annotations

import json
import re

import pytest

from tests.llm_worker.frontend.http_client import Client, body, client_of, events
from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.service_runtime.port_limits import PortLimits

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def test_the_port_answers_while_the_model_loads() -> None:
    async with client_of(None) as client:
        assert (await client.get("/health")).status == 200
        ready = await client.get("/ready")
        assert (ready.status, await ready.json()) == (503, {"ready": False, "reason": "loading the model"})
        asked = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        for response in (await client.get("/v1/models"), await client.post(CHAT, json=asked)):
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "worker_unavailable"
            assert "loading" in (await response.json())["error"]["message"]
            assert int(response.headers["Retry-After"]) > 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_only_json_is_taken(client: Client, worker: LocalWorker, path: str, content_type: str) -> None:
    data = json.dumps(body(worker)).encode()
    response = await client.post(path, data=data, headers={"Content-Type": content_type})
    error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error")
    assert content_type in error["message"] and "application/json" in error["message"]


async def test_json_may_name_its_charset(client: Client, worker: LocalWorker) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert (await client.post(CHAT, data=json.dumps(body(worker)), headers=headers)).status == 200


async def test_what_is_no_request_at_all(client: Client, worker: LocalWorker) -> None:
    headers = {"Content-Type": "application/json"}
    async with client_of(worker.served, limits=PortLimits(max_body_nbytes=1000)) as limited:
        for response, status in (
            (await client.post(CHAT, data=b"{nope", headers=headers), 400),
            (await client.get("/v1/nothing"), 404),
            (await client.get(CHAT), 405),
            (await limited.post(CHAT, json=body(worker, user="x" * 2000)), 413),
        ):
            assert response.status == status
            assert (await response.json())["error"]["code"] == "invalid_request"


async def test_null_stands_for_left_out(client: Client, worker: LocalWorker) -> None:
    nulls = ["stream", "stream_options", "n", "stop", "seed", "top_p", "logprobs", "top_logprobs"]
    response = await client.post(CHAT, json=body(worker, **dict.fromkeys(nulls)))
    assert response.status == 200, await response.text()


async def test_streamed_and_whole_answers_agree_down_to_their_logprobs(client: Client, worker: LocalWorker) -> None:
    asked = {"model": worker.served.name, "prompt": "naïve 猫", "max_tokens": 16, "temperature": 0, "logprobs": 2}
    answer = await (await client.post(COMPLETIONS, json=asked)).json()
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    chunks = await events(await client.post(COMPLETIONS, json=streamed))
    choice, pieces = answer["choices"][0], [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed_values = [each for piece in pieces if piece["logprobs"] for each in piece["logprobs"][name]]
        assert streamed_values == choice["logprobs"][name]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets == [len("".join(tokens[:index])) for index in range(16)]
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [answer["usage"]]
    assert set(chunks[-1]["timings"]) == set(answer["timings"]) >= {"load_ms", "land_ms", "ttft_ms"}
    reasons = [piece["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


async def test_a_client_that_disconnects_ends_its_request(client: Client, worker: LocalWorker) -> None:
    response = await client.post(CHAT, json=body(worker, stream=True, max_tokens=400, ignore_eos=True))
    await response.content.readuntil(b"\n\n")
    response.close()
    await worker.until_idle()
    assert 'vitrine_llm_requests_total{outcome="cancelled"} 1.0' in await (await client.get("/metrics")).text()


async def test_metrics_count_outcomes_and_tokens(client: Client, worker: LocalWorker) -> None:
    assert (await client.post(CHAT, json=body(worker))).status == 200
    assert (await client.post(CHAT, json=body(worker, messages=[{"role": "user", "content": "x" * 600}]))).status == 400
    shown = await (await client.get("/metrics")).text()
    values = dict(re.findall(r"^(vitrine_llm_\S+) (\S+)$", shown, re.MULTILINE))
    assert values['vitrine_llm_requests_total{outcome="ok"}'] == "1.0"
    assert values['vitrine_llm_requests_total{outcome="context_length_exceeded"}'] == "1.0"
    assert values['vitrine_llm_tokens_total{kind="generated"}'] == "8.0"
    assert (values["vitrine_llm_ttft_seconds_count"], values["vitrine_llm_itl_seconds_count"]) == ("1.0", "7.0")
