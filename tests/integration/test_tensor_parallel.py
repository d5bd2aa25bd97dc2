"""Two ranks are one worker: the same tokens as transformers', and the same end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from tests.deploy.proc import children_of, is_running
from tests.integration.fleet import Fleet, ServiceProcess, Worker, start_fleet
from tests.integration.test_parity import CASES
from tests.llm_worker.engine.reference_processors import processors
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.sample_models.reference import Reference

NUM_TOKENS = 32
TP = ["--tp", "2"]
TRANSPORTS = {"cpu": ["shm", "grpc"], "cuda": ["cuda_ipc", "shm", "grpc"]}
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def tp_processes(request: pytest.FixtureRequest, checkpoint_folder: Path) -> Iterator[Fleet]:
    device = str(request.param)
    flags = ["--device", device]
    with start_fleet(checkpoint_folder, TRANSPORTS[device], encoder_flags=flags, worker_flags=[*TP, *flags]) as fleet:
        yield fleet


@pytest.fixture
async def tp_fleet(tp_processes: Fleet) -> AsyncIterator[Fleet]:
    async with tp_processes.connected() as fleet:
        yield fleet


async def test_greedy_tokens_equal_transformers(tp_fleet: Fleet, reference: Reference) -> None:
    names = ["one_image", "text_only", "image_and_video", "long_with_image_across_chunks"]
    media = [CASES[name].media(tp_fleet.factor) for name in names]
    expected = [
        reference.greedy(reference.inputs(CASES[name].text, items), NUM_TOKENS)
        for name, items in zip(names, media, strict=True)
    ]
    for transport in tp_fleet.workers:
        worker = tp_fleet.worker(transport)
        alone = await worker.generate(CASES[names[0]].text, media[0], NUM_TOKENS, logprobs=0)
        together = await asyncio.gather(
            *(worker.generate(CASES[name].text, items, NUM_TOKENS) for name, items in zip(names, media, strict=True))
        )
        assert [each.token_ids for each in together] == [token_ids for token_ids, _ in expected]
        token_ids, logprobs = expected[0]
        assert alone.token_ids == token_ids
        for step, token in enumerate(alone.logprobs):
            assert token.sampled.logprob == pytest.approx(float(logprobs[step, token_ids[step]]), abs=1e-3)


async def test_sampling_parameters_and_prompt_logprobs_equal_transformers(
    tp_fleet: Fleet, reference: Reference
) -> None:
    """Rank 0 alone samples; the logits of a prompt are gathered from both."""
    case, media = CASES["one_image"], CASES["one_image"].media(tp_fleet.factor)
    inputs = reference.inputs(case.text, media)
    (prompt,) = inputs["input_ids"].tolist()
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, bad_words=((5, 6), (7,)))
    with torch.inference_mode():
        expected = reference.model.generate(
            **inputs,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            logits_processor=processors(params, len(prompt)),
        )[0, len(prompt) :].tolist()
        logprobs = reference.model(**inputs).logits[0].log_softmax(-1)
    for transport in tp_fleet.workers:
        answer = await tp_fleet.worker(transport).generate(
            case.text,
            media,
            NUM_TOKENS,
            prompt_logprobs=1,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            bad_words=[llm_pb2.TokenIds(ids=word) for word in params.bad_words],
        )
        assert answer.token_ids == expected
        assert [each.sampled.token_id for each in answer.prompt_logprobs] == prompt[1:]
        for place, each in enumerate(answer.prompt_logprobs):
            assert each.sampled.logprob == pytest.approx(float(logprobs[place, prompt[place + 1]]), abs=1e-3)
            assert each.top[0].logprob == pytest.approx(float(logprobs[place].max()), abs=1e-3)


async def test_a_grammar_constrains_answers(tp_fleet: Fleet) -> None:
    """Rank 0 alone makes masks, and sends the others the tokens that it has chosen."""
    case, media = CASES["one_image"], CASES["one_image"].media(tp_fleet.factor)
    grammar = llm_pb2.Grammar(regex="[a-f]{3}( [0-9]{2}){1,4}")
    for transport in tp_fleet.workers:
        worker = tp_fleet.worker(transport)
        free = (await worker.generate(case.text, media, NUM_TOKENS)).token_ids
        constrained, beside = await asyncio.gather(
            worker.generate(case.text, media, NUM_TOKENS, grammar=grammar),
            worker.generate(case.text, media, NUM_TOKENS),
        )
        assert re.fullmatch(grammar.regex, constrained.text)
        assert beside.token_ids == free


def alone(folder: Path, *flags: str) -> ServiceProcess:
    ports = ["--port", "0", "--grpc-port", "0", "--encoders", "127.0.0.1:9", "--connect-timeout-s", "0.2"]
    return ServiceProcess("vitrine_vlm.llm_worker", "--model", str(folder), "--device", "cpu", *TP, *ports, *flags)


async def until_ended(pid: int) -> None:
    async with asyncio.timeout(20):
        while is_running(pid):
            await asyncio.sleep(0.05)


async def test_a_worker_ends_with_its_ranks_and_says_why(qwen3_vl_folder: Path) -> None:
    idle, busy, killed = (alone(qwen3_vl_folder) for _ in range(3))
    try:
        for process in (idle, busy, killed):
            await asyncio.to_thread(process.wait_serving)
        [tp_worker] = children_of(idle.process.pid)
        os.kill(tp_worker, signal.SIGKILL)

        async with grpc.aio.insecure_channel(busy.addresses["grpc"]) as channel:
            generating = asyncio.create_task(Worker(llm_pb2_grpc.LlmStub(channel)).generate("Hello", [], 8000))
            await asyncio.sleep(1.0)
            assert not generating.done()
            [tp_worker] = children_of(busy.process.pid)
            os.kill(tp_worker, signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError):
                await asyncio.wait_for(generating, 20)

        for process in (idle, busy):
            assert await asyncio.to_thread(process.process.wait, 20) == 1
            assert any("rank 1 was killed by SIGKILL" in line for line in process.lines)
            assert any("ends without cleaning up" in line for line in process.lines)

        [tp_worker] = children_of(killed.process.pid)
        killed.process.kill()
        await until_ended(tp_worker)
    finally:
        for process in (idle, busy, killed):
            process.stop(signal.SIGKILL)


async def test_ctrl_c_lets_requests_finish(qwen3_vl_folder: Path) -> None:
    """It reaches every process of the terminal."""
    worker = alone(qwen3_vl_folder)
    try:
        await asyncio.to_thread(worker.wait_serving)
        [tp_worker] = children_of(worker.process.pid)
        async with grpc.aio.insecure_channel(worker.addresses["grpc"]) as channel:
            generating = asyncio.create_task(Worker(llm_pb2_grpc.LlmStub(channel)).generate("Hello", [], 300))
            await asyncio.sleep(0.5)
            assert not generating.done()
            for pid in (tp_worker, worker.process.pid):
                os.kill(pid, signal.SIGINT)
            assert len((await generating).token_ids) == 300
        start = time.monotonic()
        assert await asyncio.to_thread(worker.process.wait, 20) == 0, "\n".join(worker.lines)
        assert time.monotonic() - start < 10
        assert not is_running(tp_worker)
    finally:
        worker.stop(signal.SIGKILL)


async def test_a_rank_that_dies_before_it_has_joined_ends_the_worker(qwen3_vl_folder: Path) -> None:
    worker = alone(qwen3_vl_folder)
    try:
        await asyncio.to_thread(worker.wait_listening)
        async with asyncio.timeout(60):
            while not (tp_workers := children_of(worker.process.pid)):
                await asyncio.sleep(0.01)
        os.kill(tp_workers[0], signal.SIGKILL)
        assert await asyncio.to_thread(worker.process.wait, 30) == 1
        assert any("rank 1 was killed by SIGKILL" in line for line in worker.lines)
    finally:
        worker.stop(signal.SIGKILL)
