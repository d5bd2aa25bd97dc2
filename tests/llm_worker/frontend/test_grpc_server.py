"""The Llm service's refusals, and sampling parameters as clients send them, on the real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch

from tests.llm_worker.frontend.serving import serving
from vitrine_vlm.errors import WorkerUnavailable
from vitrine_vlm.llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.sample_models.reference import Reference
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.tenants import set_tenant


class TenantServicer(LlmServicer):
    """Sets the tenant where a port with keys does: in the task of the call."""

    async def Prefill(self, request, context):  # type: ignore[no-untyped-def]
        set_tenant(dict(context.invocation_metadata()).get("tenant", ""))
        return await super().Prefill(request, context)


@pytest.fixture
def calls() -> RunningCalls:
    return RunningCalls()


@pytest.fixture
def servicer(calls: RunningCalls) -> LlmServicer:
    return TenantServicer(RequestTracker(LlmMetrics(), calls))


@pytest.fixture
async def stub(servicer: LlmServicer, qwen3_vl_folder: Path) -> AsyncIterator[llm_pb2_grpc.LlmAsyncStub]:
    server = LlmServer(servicer)
    address = await server.start("127.0.0.1", 0)
    try:
        async with serving(qwen3_vl_folder) as worker, grpc.aio.insecure_channel(address) as channel:
            servicer.open(worker.served)
            yield llm_pb2_grpc.LlmStub(channel)
    finally:
        await server.stop(0)


async def test_tenants_and_salts_have_prefix_caches_of_their_own(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    async def cached_tokens(tenant: str, cache_salt: str) -> int:
        request = llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="The quick brown fox"), cache_salt=cache_salt)
        return (await stub.Prefill(request, metadata=(("tenant", tenant),))).num_cached_tokens

    for scope in (("", ""), ("red", ""), ("blue", ""), ("red", "salt"), ("", "salt")):
        assert await cached_tokens(*scope) == 0
        assert await cached_tokens(*scope) == 16
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cached_tokens("", "s" * 1025)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_grammar_constrains_the_answer_or_is_refused(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    def request(grammar: llm_pb2.Grammar) -> llm_pb2.GenerateRequest:
        sampling = llm_pb2.SamplingParams(max_tokens=50, temperature=1, grammar=grammar)
        return llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling, n=2)

    texts = ["", ""]
    async for response in stub.Generate(request(llm_pb2.Grammar(choices=llm_pb2.Choices(texts=["one", "two"])))):
        texts[response.answer] += response.delta.text
    assert set(texts) <= {"one", "two"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request(llm_pb2.Grammar(json_schema='{"items": {"not": {}}}'))):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling.grammar.json_schema.items" in (caught.value.details() or "")
    calls = llm_pb2.ToolCalls(tools=[llm_pb2.Tool(name="f", parameters='{"not": {}}')])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in stub.Generate(request(llm_pb2.Grammar(tool_calls=calls)))]
    assert "sampling.grammar.tool_calls.tools.0.parameters:" in (caught.value.details() or "")


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": float("nan")}, {"logprobs": 21}],
    ids=str,
)
async def test_sampling_out_of_range(stub: llm_pb2_grpc.LlmAsyncStub, sampling: dict[str, float]) -> None:
    request = llm_pb2.PrefillRequest(
        prompt=llm_pb2.Prompt(text="Hello"),
        sampling=llm_pb2.SamplingParams(**sampling),  # type: ignore[arg-type]
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Prefill(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(next(iter(sampling.values()))) in (caught.value.details() or "")


async def test_sampling_parameters_that_change_logits(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    """Of a prompt's first token the most probable three are known: each is excluded, or made the most probable one."""
    prompt = llm_pb2.Prompt(text="Hello")
    first = await stub.Prefill(
        llm_pb2.PrefillRequest(prompt=prompt, sampling=llm_pb2.SamplingParams(temperature=0, logprobs=3))
    )
    best, second, third = (each.token_id for each in first.first_token.top)
    word = llm_pb2.TokenIds(ids=[best])
    for fields, expected in (
        ({}, best),
        ({"bad_words": [word]}, second),
        ({"logit_bias": {best: -100.0, third: 100.0}}, third),
        ({"allowed_token_ids": llm_pb2.TokenIds(ids=[third])}, third),
        ({"min_tokens": 1, "stop_token_ids": [best]}, second),
        ({"temperature": 5.0, "min_p": 1.0}, best),
    ):
        sampling = llm_pb2.SamplingParams(**{"temperature": 0, "logprobs": 1, **fields})  # type: ignore[arg-type]
        answer = await stub.Prefill(llm_pb2.PrefillRequest(prompt=prompt, sampling=sampling))
        assert (answer.first_token.sampled.token_id, answer.first_token.top[0].token_id) == (expected, best)


async def test_several_answers(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    def asked(n: int = 0, best_of: int = 0) -> llm_pb2.GenerateRequest:
        sampling = llm_pb2.SamplingParams(temperature=1.5, seed=5, max_tokens=6)
        return llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling, n=n, best_of=best_of)

    async def answers(request: llm_pb2.GenerateRequest) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        kinds: list[str | None] = []
        async for response in stub.Generate(request):
            kinds.append(response.WhichOneof("event"))
            found.setdefault(response.answer, []).extend(response.delta.token_ids)
        assert kinds[0] == "started" and kinds.count("started") == 1
        assert kinds.count("finished") == len(found)
        return found

    two = await answers(asked(n=2))
    assert two.keys() == {0, 1} and two[0] != two[1]
    assert await answers(asked()) == {0: two[0]}
    assert (await answers(asked(best_of=2)))[0] in two.values()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(asked(n=3, best_of=2))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unset_sampling_is_the_checkpoints(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    first = await stub.Prefill(llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="Hello")))
    assert first.num_prompt_tokens == 5
    assert first.first_token.sampled.logprob < 0


async def test_penalties_of_the_checkpoints_generation_config(
    servicer: LlmServicer, tmp_path: Path, qwen3_vl_folder: Path
) -> None:
    """transformers applies them where a request says nothing, and so does the worker."""
    folder = shutil.copytree(qwen3_vl_folder, tmp_path / "copy")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.5}))
    reference = Reference(folder)
    inputs = reference.inputs("Hello, hello, hello", [])
    num_prompt = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        expected, neutral = (
            reference.model.generate(**inputs, max_new_tokens=24, **others)[0, num_prompt:].tolist()
            for others in ({}, {"repetition_penalty": 1.0})
        )
    assert expected != neutral
    server = LlmServer(servicer)
    address = await server.start("127.0.0.1", 0)
    try:
        async with serving(folder) as worker, grpc.aio.insecure_channel(address) as channel:
            servicer.open(worker.served)
            for sampling, tokens in (
                (llm_pb2.SamplingParams(max_tokens=24), expected),
                (llm_pb2.SamplingParams(max_tokens=24, repetition_penalty=1.0), neutral),
            ):
                request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello, hello, hello"), sampling=sampling)
                answer: list[int] = []
                async for response in llm_pb2_grpc.LlmStub(channel).Generate(request):
                    answer.extend(response.delta.token_ids)
                assert answer == tokens
    finally:
        await server.stop(0)


async def test_prefill_says_how_much_of_the_prompt_was_there(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    request = llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="x" * 40))
    assert [(await stub.Prefill(request)).num_cached_tokens for _ in range(2)] == [0, 32]


async def test_until_the_model_is_loaded_it_is_unavailable() -> None:
    server = LlmServer(LlmServicer(RequestTracker(LlmMetrics(), RunningCalls())))
    address = await server.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await llm_pb2_grpc.LlmStub(channel).Prefill(llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="Hello")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "loading" in (caught.value.details() or "")
    finally:
        await server.stop(0)


async def test_once_it_drains_it_is_unavailable(calls: RunningCalls, stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    calls.refuse(lambda: WorkerUnavailable("the worker is shutting down"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Prefill(llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="Hello")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in (caught.value.details() or "")
