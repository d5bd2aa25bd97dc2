"""Which items run together, which run next, and which do not run at all."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from tests.encoder_service.models.reference import random_patches
from tests.encoder_service.running import GatedTower
from vitrine_vlm.encoder_service.engine import batcher as batcher_module
from vitrine_vlm.encoder_service.engine.batch import EncodedItem
from vitrine_vlm.encoder_service.engine.batcher import Batcher, BatchReport
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.families import build_tower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.errors import EncoderUnavailable, InternalError
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.service_runtime.supervisor import Supervisor

PATCH_WIDTH = 3 * 2 * 16 * 16
SMALL: GridTHW = (1, 4, 4)
WIDE: GridTHW = (1, 4, 6)
LARGE: GridTHW = (1, 8, 8)


@pytest.fixture(scope="module")
def tower(qwen3_vl_folder: Path) -> GatedTower:
    return GatedTower(build_tower(open_checkpoint(str(qwen3_vl_folder)), torch.device("cpu"), torch.float32))


@asynccontextmanager
async def batching(
    tower: GatedTower, *, max_batch_patches: int = 64, cost: CostModel | None = None
) -> AsyncIterator[tuple[Batcher, list[BatchReport]]]:
    tower.batches.clear()
    tower.entered.clear()
    tower.gate.set()
    tower.error = None
    reports: list[BatchReport] = []
    cost = cost or CostModel(0.0, 0.0, 0.0)
    batcher = Batcher(tower, cost, max_batch_patches=max_batch_patches, on_batch=reports.append)
    batcher.start(Supervisor())
    try:
        yield batcher, reports
    finally:
        tower.gate.set()
        await batcher.close()


def submit(batcher: Batcher, grid: GridTHW, seed: int = 0, deadline: float = math.inf) -> asyncio.Task[EncodedItem]:
    return asyncio.create_task(batcher.encode(random_patches([grid], PATCH_WIDTH, seed), grid, deadline))


async def block_tower(tower: GatedTower, batcher: Batcher) -> asyncio.Task[EncodedItem]:
    """Occupies the tower with one item until the gate is opened."""
    tower.gate.clear()
    blocker = submit(batcher, SMALL)
    assert await asyncio.to_thread(tower.entered.wait, 10)
    return blocker


async def wait_packed(batcher: Batcher) -> None:
    """Waits until the batch builder has packed what waits."""
    for _ in range(200):
        await asyncio.sleep(0.005)
        if batcher._channel.full():
            return
    raise AssertionError("no batch was packed")


async def test_rows_are_those_of_the_item_alone(tower: GatedTower) -> None:
    grids: list[GridTHW] = [SMALL, LARGE, WIDE, (2, 2, 4), SMALL]
    async with batching(tower) as (batcher, reports):
        tasks = [submit(batcher, grid, seed) for seed, grid in enumerate(grids)]
        encoded = await asyncio.gather(*tasks)
    for seed, (grid, item) in enumerate(zip(grids, encoded, strict=True)):
        alone = tower._tower.forward(random_patches([grid], PATCH_WIDTH, seed), [grid])
        assert item.rows_TW.shape == alone.shape
        assert (item.rows_TW - alone).abs().max() < 1e-4
        assert item.forward_ms > 0
    assert sum(report.num_items for report in reports) == len(grids)
    assert sum(report.num_patches for report in reports) == sum(math.prod(grid) for grid in grids)


async def test_what_arrives_while_the_tower_is_busy_runs_together_up_to_the_limit(tower: GatedTower) -> None:
    async with batching(tower, max_batch_patches=40) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        waiting = [submit(batcher, grid) for grid in (SMALL, WIDE, SMALL, LARGE, SMALL)]
        await wait_packed(batcher)
        tower.gate.set()
        await asyncio.gather(blocker, *waiting)
    # 16 + 24 patches fit into 40, another 16 do not; 64 run alone though they are more than 40.
    assert tower.batches == [[SMALL], [SMALL, WIDE], [SMALL], [LARGE], [SMALL]]


async def test_near_deadlines_come_first_and_no_item_that_joins_makes_them_late(tower: GatedTower) -> None:
    cost = CostModel(0.0, 0.1, 0.0)  # 1.6 s for SMALL, 2.4 s for WIDE
    async with batching(tower, cost=cost) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        now = time.monotonic()
        waiting = [
            submit(batcher, SMALL),
            submit(batcher, SMALL, deadline=now + 300),  # is due after 30 s in the queue, behind the one before
            submit(batcher, WIDE, deadline=now + 4.1),
            submit(batcher, LARGE, deadline=now + 0.001),  # late in any case: other items may join it
        ]
        await asyncio.sleep(0.02)
        tower.gate.set()
        await asyncio.gather(blocker, *waiting)
    # WIDE has 1.7 s to spare (the model learns that it takes less), which one SMALL uses.
    assert tower.batches == [[SMALL], [LARGE], [WIDE, SMALL], [SMALL]]


async def test_a_batch_behind_one_that_runs_is_built_late_so_that_others_join_it(tower: GatedTower) -> None:
    cost = CostModel(0.0, 10.0, 0.0)  # 160 s for SMALL
    async with batching(tower, max_batch_patches=40, cost=cost) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        early = submit(batcher, SMALL)
        await asyncio.sleep(0.05)
        assert batcher.waiting_patches == 16
        late = submit(batcher, WIDE)
        await wait_packed(batcher)  # as no other would fit
        last = [submit(batcher, SMALL), submit(batcher, SMALL)]
        await asyncio.sleep(0.05)
        tower.gate.set()
        await asyncio.wait_for(asyncio.gather(blocker, early, late, *last), 10)
    assert tower.batches == [[SMALL], [SMALL, WIDE], [SMALL, SMALL]]


async def test_it_is_built_when_the_one_in_front_should_have_nearly_ended(tower: GatedTower) -> None:
    async with batching(tower, cost=CostModel(1.0, 0.0, 0.0)) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        early = submit(batcher, SMALL)
        await asyncio.sleep(0.05)
        assert batcher.waiting_patches == 16
        async with asyncio.timeout(10):
            while not batcher._channel.full():
                await asyncio.sleep(0.01)
        tower.gate.set()
        await asyncio.gather(blocker, early)


async def test_an_idle_tower_runs_at_once_what_there_is(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        await asyncio.wait_for(submit(batcher, SMALL), 5)
        await asyncio.wait_for(submit(batcher, SMALL), 5)
    assert tower.batches == [[SMALL], [SMALL]]


async def test_the_next_batch_is_packed_while_one_runs(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        packed = submit(batcher, WIDE)
        await wait_packed(batcher)
        assert batcher.waiting_patches == 0
        later = submit(batcher, LARGE)
        await asyncio.sleep(0.02)
        assert batcher.waiting_patches == 64, "only one batch is made ahead"
        tower.gate.set()
        await asyncio.gather(blocker, packed, later)
    assert tower.batches == [[SMALL], [WIDE], [LARGE]]


async def test_cancelled_items_do_not_run(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        packed = submit(batcher, WIDE)
        await wait_packed(batcher)
        waiting, kept = submit(batcher, LARGE), submit(batcher, SMALL)
        await asyncio.sleep(0)
        packed.cancel()
        waiting.cancel()
        await asyncio.gather(packed, waiting, return_exceptions=True)
        assert batcher.waiting_patches == 16, "a cancelled item's patches stay in memory"
        tower.gate.set()
        await asyncio.gather(blocker, kept)
    assert tower.batches == [[SMALL], [SMALL]]


async def test_a_failing_forward_fails_its_batch_and_nothing_else(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, reports):
        tower.error = RuntimeError("a secret of the machine")
        with pytest.raises(InternalError) as failure:
            await submit(batcher, SMALL)
        assert "secret" not in str(failure.value)
        tower.error = None
        await submit(batcher, SMALL)
    assert len(reports) == 1


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("fails", ["packing", "forward"])
async def test_a_lost_gpu_is_reported(
    tower: GatedTower, fails: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "is_lost", lambda device: is_lost)
    reports: list[str] = []
    tower.error = RuntimeError("an illegal memory access was encountered") if fails == "forward" else None
    batcher = Batcher(tower, CostModel(0.0, 0.0, 0.0), max_batch_patches=64, on_gpu_lost=lambda: reports.append("lost"))
    batcher.start(Supervisor())
    try:
        blocker = await block_tower(tower, batcher) if fails == "packing" else None
        widths = [7, PATCH_WIDTH] if fails == "packing" else [PATCH_WIDTH]
        tasks = [asyncio.create_task(batcher.encode(torch.zeros(16, width), SMALL)) for width in widths]
        await asyncio.sleep(0.05)
        tower.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in results} == {InternalError}
        if blocker is not None:
            await blocker
        await asyncio.sleep(0.05)
        assert reports == (["lost"] if is_lost else [])
    finally:
        tower.error = None
        tower.gate.set()
        await batcher.close()


class RecordingHook:
    """Records the calls of its methods, and the rows."""

    def __init__(self, calls: list[str], error: Exception | None = None) -> None:
        self.rows: torch.Tensor | None = None
        self._calls = calls
        self._error = error

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        self._calls.append("enqueue")
        if self._error is not None:
            raise self._error
        self.rows = rows_TW

    def batch_ended(self) -> None:
        self._calls.append("ended")


async def test_hooks_get_their_rows_behind_the_forward_and_before_the_request_does(tower: GatedTower) -> None:
    calls: list[str] = []
    hooks = [RecordingHook(calls), RecordingHook(calls)]
    async with batching(tower) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        patches = [random_patches([grid], PATCH_WIDTH) for grid in (SMALL, WIDE)]
        tasks = [
            asyncio.create_task(batcher.encode(each_PX, grid, hook=hook))
            for each_PX, grid, hook in zip(patches, (SMALL, WIDE), hooks, strict=True)
        ]
        tasks[0].add_done_callback(lambda task: calls.append("rows"))
        await wait_packed(batcher)
        tower.gate.set()
        encoded = await asyncio.gather(*tasks)
        await blocker
    assert calls == ["enqueue", "enqueue", "ended", "ended", "rows"]
    for item, hook in zip(encoded, hooks, strict=True):
        assert hook.rows is not None and torch.equal(item.rows_TW, hook.rows)


@pytest.mark.parametrize("fails", ["forward", "hook"])
async def test_hooks_are_notified_of_the_end_of_a_batch_that_fails(tower: GatedTower, fails: str) -> None:
    calls: list[str] = []
    async with batching(tower) as (batcher, _):
        tower.error = RuntimeError("broken") if fails == "forward" else None
        hook = RecordingHook(calls, RuntimeError("broken") if fails == "hook" else None)
        with pytest.raises(InternalError):
            await batcher.encode(random_patches([SMALL], PATCH_WIDTH), SMALL, hook=hook)
        await asyncio.sleep(0)
        assert calls == (["ended"] if fails == "forward" else ["enqueue", "ended"])
        tower.error = None
        await submit(batcher, SMALL)


async def test_grids_that_do_not_fit_the_patches_fail_their_item(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        with pytest.raises(InternalError):
            await batcher.encode(torch.zeros(15, PATCH_WIDTH), SMALL)
        await submit(batcher, SMALL)


async def test_patches_of_another_width_fail_their_batch_and_nothing_else(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        narrow = asyncio.create_task(batcher.encode(torch.zeros(16, 7), SMALL))
        beside = submit(batcher, SMALL)
        await asyncio.sleep(0.05)
        tower.gate.set()
        results = await asyncio.gather(blocker, narrow, beside, return_exceptions=True)
        assert [type(result) for result in results] == [EncodedItem, InternalError, InternalError]
        await asyncio.wait_for(submit(batcher, SMALL), 5)


async def test_closing_fails_the_items_that_have_not_run(tower: GatedTower) -> None:
    async with batching(tower) as (batcher, _):
        blocker = await block_tower(tower, batcher)
        packed = submit(batcher, SMALL)
        await wait_packed(batcher)
        waiting = submit(batcher, SMALL)
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, tower.gate.set)
        await batcher.close()
        for task in (blocker, packed, waiting):
            with pytest.raises(EncoderUnavailable):
                await task
        with pytest.raises(EncoderUnavailable):
            await submit(batcher, SMALL)


async def test_two_hundred_at_once(tower: GatedTower) -> None:
    async with batching(tower, max_batch_patches=320) as (batcher, reports):
        encoded = await asyncio.gather(*(submit(batcher, SMALL, seed % 5) for seed in range(200)))
    assert sum(report.num_items for report in reports) == 200
    assert max(report.num_patches for report in reports) <= 320
    assert len(reports) < 30
    for seed, item in enumerate(encoded):
        assert (item.rows_TW - encoded[seed % 5].rows_TW).abs().max() < 1e-4


async def test_a_metric_that_raises_harms_no_item(tower: GatedTower) -> None:
    def broken(report: BatchReport) -> None:
        raise ValueError("a metric's own")

    tower.gate.set()
    supervisor = Supervisor()
    batcher = Batcher(tower, CostModel(0.0, 0.0, 0.0), max_batch_patches=64, on_batch=broken)
    batcher.start(supervisor)
    try:
        async with asyncio.timeout(20):
            for seed in range(2):  # the loop goes on
                assert len((await submit(batcher, SMALL, seed)).rows_TW)
        assert supervisor.failure is None
    finally:
        await batcher.close()
