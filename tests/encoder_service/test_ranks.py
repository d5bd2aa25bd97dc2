"""Data parallel: ranks on ports of their own, items spread over them, a dead one replaced, all stopped together."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.deploy.proc import children_of, is_running
from tests.encoder_service.running import image, png
from tests.integration.fleet import ServiceProcess
from vitrine_vlm.deploy.launcher.stack import free_ports
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.ranks import rank_environment
from vitrine_vlm.types import RowsEvent

DP = 3


def test_each_rank_has_its_ports_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = EncoderConfig(model="folder", port=7000, metrics_port=9000, dp=4, cuda_graphs=False)
    found = [rank_environment(config, rank, {"CUDA_VISIBLE_DEVICES": "5,2,GPU-7"}) for rank in range(3)]
    assert [each["VITRINE_ENCODER_PORT"] for each in found] == ["7000", "7001", "7002"]
    assert [each["VITRINE_ENCODER_METRICS_PORT"] for each in found] == ["9000", "9001", "9002"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["5", "2", "GPU-7"]
    assert found[0]["VITRINE_ENCODER_DP"] == "1"
    assert found[0]["VITRINE_ENCODER_CUDA_GRAPHS"] == "False"
    free = rank_environment(EncoderConfig(model="folder", port=0, dp=2), 1, {})
    assert free["VITRINE_ENCODER_PORT"] == "0"
    assert free["CUDA_VISIBLE_DEVICES"] == "1"


def test_ranks_share_no_gpu_and_use_none_that_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EncoderConfig(model="folder", dp=3)
    with pytest.raises(ValueError, match=r"--dp 3 .* CUDA_VISIBLE_DEVICES=5,2"):
        rank_environment(config, 2, {"CUDA_VISIBLE_DEVICES": "5,2"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--dp 3 is more than the 2 GPUs"):
        rank_environment(config, 2, {})
    for hidden in ("", "-1"):
        assert "CUDA_VISIBLE_DEVICES" not in rank_environment(config, 2, {"CUDA_VISIBLE_DEVICES": hidden})
    on_cpu = EncoderConfig(model="folder", dp=3, device="cpu")
    assert rank_environment(on_cpu, 2, {"CUDA_VISIBLE_DEVICES": "5,2"})["VITRINE_ENCODER_DEVICE"] == "cpu"


async def encode(client: EncoderClient, pictures: list[bytes]) -> dict[int, torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    async for event in client.encode([image(picture) for picture in pictures], "r"):
        if isinstance(event, RowsEvent):
            landed = torch.empty(event.rows.num_tokens, 96)
            event.rows.copy_to(landed, None, 0)
            event.rows.release()
            rows[event.item_index] = landed
    return rows


async def wait_ready(client: EncoderClient, num_ready: int) -> None:
    deadline = time.monotonic() + 60
    while sum(status.ready for status in client.status()) != num_ready:
        assert time.monotonic() < deadline, client.status()
        await asyncio.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
async def test_ranks_share_the_items_and_a_dead_one_is_replaced(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    port = free_ports(DP, in_a_row=True)[0]
    flags = ["--model", str(qwen3_vl_folder), "--port", str(port), "--dp", str(DP), "--shm-folder", str(tmp_path)]
    # Ranks are seen to serve at any level of the log: one that was not would end them all when it dies.
    encoder = ServiceProcess(
        "vitrine_vlm.encoder_service", *flags, "--pool-bytes", "8388608", "--log-level", "error", fork=False
    )
    client = EncoderClient([f"127.0.0.1:{port + rank}" for rank in range(DP)], None, shm_folder=tmp_path)
    try:
        await client.start()
        await wait_ready(client, DP)
        pictures = [png(64 + 32 * (seed % 3), 64, seed) for seed in range(12)]
        first = await encode(client, pictures)
        assert len(first) == 12
        assert len(await encode(client, pictures[:1])) == 1  # fewer items than ranks
        served = [int(rank) for line in encoder.lines for rank in re.findall(r"^\[rank (\d)\].* SERVING ", line)]
        assert sorted(served) == [0, 1, 2]

        victim = children_of(encoder.process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        during = await encode(client, pictures)
        for index, rows in first.items():  # in other batches, which may round otherwise
            torch.testing.assert_close(during[index], rows, atol=1e-5, rtol=1e-4)
        await asyncio.sleep(0)
        deadline = time.monotonic() + 60
        while not any("starting it again" in line for line in encoder.lines):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await wait_ready(client, DP)
        assert len(await encode(client, pictures)) == 12
    finally:
        await client.close()
        children = children_of(encoder.process.pid)
        assert await asyncio.to_thread(encoder.stop) == 0
    assert len(children) == DP
    assert not any(map(is_running, children))


def test_a_model_that_cannot_be_served_ends_it(tmp_path: Path) -> None:
    encoder = ServiceProcess(
        "vitrine_vlm.encoder_service", "--model", str(tmp_path / "nothing"), "--port", "0", "--dp", "2"
    )
    assert encoder.process.wait(60) == 1
    deadline = time.monotonic() + 10
    while not any("cannot start: rank" in line for line in encoder.lines):
        assert time.monotonic() < deadline, encoder.lines
        time.sleep(0.05)
