"""Two ranks are one worker: the same tokens as transformers', and the same end."""

from __future__ import annotations

import asyncio
import os
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
from vitrine_vlm.protos.llm.v1 import llm_pb2_grpc
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
