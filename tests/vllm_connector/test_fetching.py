"""Rows of a real encoder land in workers that are processes of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoder_service.running import RunningEncoder, image, png, run_encoder
from tests.vllm_connector.worker_process import worker_processes
from vitrine_vlm.errors import EncoderMismatch, EncoderUnavailable, PlaceholderMismatch, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem
from vitrine_vlm.vllm_connector import fetching
from vitrine_vlm.vllm_connector.fetching import Fetcher, FetchOrder, FetchResult, RowFormat
from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.model_check import ServedModel
from vitrine_vlm.vllm_connector.settings import ConnectorSettings
from vitrine_vlm.vllm_connector.worker_side import WorkerSide

PICTURE = png(128, 96)
NUM_TOKENS = 12


def accept_any(address: str, description: encoder_pb2.DescribeResponse) -> None:
    pass


def order(delivery_id: int, item: MediaItem | None = None, num_tokens: int = NUM_TOKENS) -> FetchOrder:
    return FetchOrder(delivery_id, f"r{delivery_id}", "tenant", num_tokens, lambda: item or image(PICTURE))


async def result_of(fetcher: Fetcher) -> FetchResult:
    async with asyncio.timeout(20):
        while not (results := fetcher.take_results()):
            await asyncio.sleep(0.01)
    (result,) = results
    return result


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_fetcher(
    encoder: str, row_format: RowFormat, channel: Path, folder: Path, num_workers: int, check: Any, **extra: Any
) -> AsyncIterator[Fetcher]:
    settings = ConnectorSettings(encoders=encoder, shm_folder=str(folder), **extra)
    fetcher = Fetcher(settings, row_format, num_workers, channel, check)
    try:
        await asyncio.to_thread(fetcher.start)
        yield fetcher
    finally:
        await asyncio.to_thread(fetcher.close)


@asynccontextmanager
async def with_worker_threads(
    encoder: RunningEncoder, channel: Path, folder: Path, num_workers: int = 1, check: Any = accept_any, **extra: Any
) -> AsyncIterator[tuple[Fetcher, list[WorkerSide]]]:
    sides = [WorkerSide(channel, rank, torch.device("cpu")) for rank in range(num_workers)]
    row_format = RowFormat("float32", encoder.identity.row_width)
    try:
        async with running_fetcher(
            encoder.address, row_format, channel, folder, num_workers, check, **extra
        ) as fetcher:
            yield fetcher, sides
    finally:
        for side in sides:
            await asyncio.to_thread(side.close)


async def test_rows_land_in_every_worker_process(qwen3_vl_folder: Path, tmp_path: Path, channel: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        row_format = RowFormat("float32", encoder.identity.row_width)
        with worker_processes(channel, 2) as workers:
            async with running_fetcher(encoder.address, row_format, channel, tmp_path, 2, accept_any) as fetcher:
                fetcher.fetch(order(7))
                result = await result_of(fetcher)
                expected = encoder.rows_of(PICTURE)
                assert (result.error, result.transport, result.nbytes) == (None, "shm", expected.nbytes)
                await until(lambda: not encoder.exporter.stats().live_leases)
                for rank, worker in enumerate(workers):
                    rows = worker.step({"x": 7}, [7], tmp_path / f"{rank}.npz")
                    assert rows["x"].std() > 0.1 and torch.equal(rows["x"], expected)


async def test_rows_land_as_bytes(qwen3_vl_folder: Path, tmp_path: Path, channel: Path) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path, num_workers=2, transport="grpc") as (fetcher, sides),
    ):
        fetcher.fetch(order(7))
        assert (await result_of(fetcher)).transport == "grpc"
        for side in sides:
            cache: dict[str, torch.Tensor] = {}
            side.start_step(StepCommands({"x": 7}, [7]), cache)
            assert torch.equal(cache["x"], encoder.rows_of(PICTURE))


async def test_another_number_of_rows_than_vllm_has_places_for_is_an_error(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path
) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path) as (fetcher, _),
    ):
        fetcher.fetch(order(1, num_tokens=NUM_TOKENS + 1))
        error = (await result_of(fetcher)).error
        assert isinstance(error, PlaceholderMismatch) and "makes 12 rows" in str(error) and "13 places" in str(error)
        fetcher.fetch(order(2))
        assert (await result_of(fetcher)).error is None
        await until(lambda: not encoder.exporter.stats().live_leases)


async def test_a_cancelled_fetch_leaves_nothing(qwen3_vl_folder: Path, tmp_path: Path, channel: Path) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path) as (fetcher, _),
    ):
        encoder.tower.gate.clear()
        fetcher.fetch(order(1))
        await asyncio.to_thread(encoder.tower.entered.wait, 20)
        fetcher.cancel(1)
        await until(lambda: not encoder.calls.count)
        encoder.tower.gate.set()
        fetcher.fetch(order(2))
        assert (await result_of(fetcher)).delivery_id == 2, "the first has no result"
        await until(lambda: not encoder.exporter.stats().live_leases)


async def test_a_lost_worker_fails_what_is_fetched_and_nothing_else(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path
) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path, num_workers=2) as (fetcher, sides),
    ):
        await asyncio.to_thread(sides[1].close)
        fetcher.fetch(order(1))
        error = (await result_of(fetcher)).error
        assert isinstance(error, TransportUnavailable) and "worker 1 cannot be reached" in str(error)
        await until(lambda: not encoder.exporter.stats().live_leases)


async def test_rows_that_one_worker_could_not_copy_are_freed_in_the_others(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path
) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path, num_workers=2) as (fetcher, sides),
    ):
        fetcher.fetch(order(1))
        assert (await result_of(fetcher)).error is None
        sides[1]._landing.unmap(0)  # the encoder's pool
        fetcher.fetch(order(2))
        error = (await result_of(fetcher)).error
        assert isinstance(error, TransportUnavailable) and "pool 0 is not mapped" in str(error)
        await until(lambda: sides[0]._landing.num_landed == 1)
        await until(lambda: not encoder.exporter.stats().live_leases)


async def test_a_thread_that_ends_fails_all_orders(qwen3_vl_folder: Path, tmp_path: Path, channel: Path) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as encoder,
        with_worker_threads(encoder, channel, tmp_path) as (fetcher, _),
    ):
        encoder.tower.gate.clear()
        fetcher.fetch(order(1))
        await asyncio.to_thread(encoder.tower.entered.wait, 20)
        fetcher.close()
        encoder.tower.gate.set()
        assert isinstance((await result_of(fetcher)).error, EncoderUnavailable)
        fetcher.fetch(order(2))
        assert isinstance((await result_of(fetcher)).error, EncoderUnavailable)


async def test_an_encoder_that_cannot_serve_the_model_is_refused_at_start(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path
) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        served = ServedModel(
            model_type=encoder.identity.model_type,
            out_hidden_size=encoder.identity.out_hidden_size,
            deepstack_visual_indexes=(0,),
            dtype="bfloat16",
            patch_size=encoder.preprocessor.settings.patch_size,
            temporal_patch_size=2,
            merge_size=2,
        )
        with pytest.raises(EncoderMismatch) as refused:
            async with with_worker_threads(encoder, channel, tmp_path, check=served.check):
                pass
        indexes = encoder.identity.deepstack_visual_indexes
        assert f"its deepstack_visual_indexes {indexes!r}, vLLM's is (0,)" in str(refused.value)
        assert "its dtype 'float32', vLLM's is 'bfloat16'" in str(refused.value)
        assert "patch_size" not in str(refused.value)
        served = replace(served, deepstack_visual_indexes=indexes, dtype="float32", revision="f" * 64)
        with pytest.raises(EncoderMismatch, match=f"its revision '{encoder.identity.revision}'"):
            async with with_worker_threads(encoder, channel, tmp_path, check=served.check):
                pass
        async with with_worker_threads(
            encoder, channel, tmp_path, check=replace(served, revision=encoder.identity.revision).check
        ):
            pass


async def test_workers_that_do_not_connect_are_named_at_start(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_WORKERS_TIMEOUT_S", 2.0)
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        side = WorkerSide(channel, 0, torch.device("cpu"))
        with pytest.raises(TransportUnavailable, match="1 of 2 vLLM workers"):
            async with running_fetcher(encoder.address, RowFormat("float32", 8), channel, tmp_path, 2, accept_any):
                pass
        await asyncio.to_thread(side.close)


async def test_no_encoder_at_start_is_no_error(tmp_path: Path, channel: Path) -> None:
    side = WorkerSide(channel, 0, torch.device("cpu"))
    async with running_fetcher("localhost:1", RowFormat("float32", 8), channel, tmp_path, 1, accept_any) as fetcher:
        start = time.monotonic()
        fetcher.fetch(order(1))
        assert isinstance((await result_of(fetcher)).error, EncoderUnavailable)
        assert time.monotonic() - start < 2.0
    await asyncio.to_thread(side.close)
