"""Refusals of the Llm service, on the real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from tests.llm_worker.frontend.serving import serving
from vitrine_vlm.errors import WorkerUnavailable
from vitrine_vlm.llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.service_runtime.running_calls import RunningCalls


@pytest.fixture
def calls() -> RunningCalls:
    return RunningCalls()


@pytest.fixture
def servicer(calls: RunningCalls) -> LlmServicer:
    return LlmServicer(RequestTracker(LlmMetrics(), calls))


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


async def test_unset_sampling_is_the_checkpoints(stub: llm_pb2_grpc.LlmAsyncStub) -> None:
    first = await stub.Prefill(llm_pb2.PrefillRequest(prompt=llm_pb2.Prompt(text="Hello")))
    assert first.num_prompt_tokens == 5
    assert first.first_token.sampled.logprob < 0


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
