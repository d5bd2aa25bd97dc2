"""Equal items are computed once, bytes stay within bounds, and failures and cancellations are not cached."""

from __future__ import annotations

import asyncio

import pytest
import torch

from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache, EncodedRows
from vitrine_vlm.errors import NotAnImage, Overloaded
from vitrine_vlm.service_runtime.supervisor import Supervisor

ROW_NBYTES = 4 * 8


def rows(num_tokens: int, value: float = 0.0) -> EncodedRows:
    return EncodedRows(torch.full((num_tokens, 8), value), preprocess_ms=1.0, queue_ms=2.0, forward_ms=3.0)


class Compute:
    """Computes rows, or fails; counts its calls and waits for `gate`."""

    def __init__(self, result: EncodedRows | Exception) -> None:
        self.result = result
        self.num_calls = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> EncodedRows:
        self.num_calls += 1
        await self.gate.wait()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def cache(num_rows: int) -> EmbeddingCache:
    cached = EmbeddingCache(gpu_nbytes=0, host_nbytes=num_rows * ROW_NBYTES)
    cached.start(Supervisor())
    return cached


async def test_the_second_time_rows_are_cached_ones() -> None:
    cached, compute = cache(10), Compute(rows(4, 5.0))
    first, second = await cached.get_or_compute(b"a", compute), await cached.get_or_compute(b"a", compute)
    assert compute.num_calls == 1
    assert torch.equal(first.rows_TW, second.rows_TW)
    assert (first.forward_ms, second.forward_ms) == (3.0, 0.0)
    await cached.flush()
    stats = cached.stats()
    assert (stats.hits, stats.joined, stats.misses, stats.nbytes["host"]) == (1, 0, 1, 4 * ROW_NBYTES)


async def test_the_least_recently_used_rows_leave_and_bytes_stay_within_bounds() -> None:
    cached = cache(10)
    computes = {key: Compute(rows(4)) for key in (b"a", b"b", b"c")}
    for key in (b"a", b"b", b"a", b"c"):  # b is the oldest when c comes
        await cached.get_or_compute(key, computes[key])
        await cached.flush()
    assert [cached.has(key) for key in (b"a", b"b", b"c")] == [True, False, True]
    assert cached.stats().nbytes["host"] == 8 * ROW_NBYTES
    assert cached.stats().evictions == 1
    await cached.get_or_compute(b"b", computes[b"b"])
    assert computes[b"b"].num_calls == 2


async def test_rows_larger_than_the_cache_are_returned_and_not_cached() -> None:
    cached = cache(10)
    await cached.get_or_compute(b"a", Compute(rows(4)))
    assert len((await cached.get_or_compute(b"b", Compute(rows(11)))).rows_TW) == 11
    await cached.flush()
    assert (cached.has(b"a"), cached.has(b"b")) == (True, False)


async def test_a_view_keeps_only_its_own_bytes() -> None:
    batch = torch.arange(800.0).view(100, 8)
    cached = cache(10)
    await cached.get_or_compute(b"a", Compute(EncodedRows(batch[10:14])))
    await cached.flush()
    again = (await cached.get_or_compute(b"a", Compute(rows(0)))).rows_TW
    assert torch.equal(again, batch[10:14])
    assert again.untyped_storage().nbytes() == 4 * ROW_NBYTES


@pytest.mark.parametrize("num_rows", [0, 100])
async def test_equal_items_in_flight_are_computed_once(num_rows: int) -> None:
    cached, compute = cache(num_rows), Compute(rows(4, 7.0))
    compute.gate.clear()
    asked = [asyncio.create_task(cached.get_or_compute(b"a", compute)) for _ in range(5)]
    await asyncio.sleep(0)
    assert cached.has(b"a")
    compute.gate.set()
    assert [float(each.rows_TW[0, 0]) for each in await asyncio.gather(*asked)] == [7.0] * 5
    assert compute.num_calls == 1
    assert (cached.stats().joined, cached.stats().misses) == (4, 1)
    await cached.flush()
    assert cached.has(b"a") == bool(num_rows)


async def test_if_the_computation_fails_all_fail_alike_and_the_next_request_computes_again() -> None:
    cached, compute = cache(10), Compute(NotAnImage("damaged"))
    compute.gate.clear()
    asked = [asyncio.create_task(cached.get_or_compute(b"a", compute)) for _ in range(3)]
    await asyncio.sleep(0)
    compute.gate.set()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [NotAnImage] * 3
    assert compute.num_calls == 1
    assert len((await cached.get_or_compute(b"a", Compute(rows(4)))).rows_TW) == 4


async def test_if_the_first_request_is_refused_another_computes() -> None:
    """Its request may end sooner than those of the others."""
    cached, refused, compute = cache(10), Compute(Overloaded("no time")), Compute(rows(4))
    refused.gate.clear()
    first = asyncio.create_task(cached.get_or_compute(b"a", refused))
    await asyncio.sleep(0)
    others = [asyncio.create_task(cached.get_or_compute(b"a", compute)) for _ in range(2)]
    await asyncio.sleep(0)
    refused.gate.set()
    with pytest.raises(Overloaded):
        await first
    assert [len(each.rows_TW) for each in await asyncio.gather(*others)] == [4, 4]
    assert compute.num_calls == 1


async def test_if_the_first_request_is_cancelled_another_computes() -> None:
    cached, compute = cache(10), Compute(rows(4))
    compute.gate.clear()
    first = asyncio.create_task(cached.get_or_compute(b"a", compute))
    await asyncio.sleep(0)
    others = [asyncio.create_task(cached.get_or_compute(b"a", compute)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.01)
    compute.gate.set()
    for other in others:
        assert len((await other).rows_TW) == 4
    assert compute.num_calls == 2


async def test_rows_are_computed_once_where_all_requests_are_cancelled_at_once() -> None:
    cached, compute = cache(10), Compute(rows(4))
    compute.gate.clear()
    asked = [asyncio.create_task(cached.get_or_compute(b"a", compute)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in asked:
        task.cancel()
    await asyncio.wait(asked, timeout=0.1)
    compute.gate.set()  # lets them end that should have ended
    await asyncio.wait(asked)
    assert [task.cancelled() for task in asked] == [True] * 3
    assert compute.num_calls == 1
    assert not cached.has(b"a")


async def test_a_request_that_waits_can_be_cancelled_alone() -> None:
    cached, compute = cache(10), Compute(rows(4))
    compute.gate.clear()
    first = asyncio.create_task(cached.get_or_compute(b"a", compute))
    await asyncio.sleep(0)
    second = asyncio.create_task(cached.get_or_compute(b"a", compute))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    compute.gate.set()
    assert len((await first).rows_TW) == 4
    assert compute.num_calls == 1


@pytest.mark.gpu
async def test_rows_that_are_evicted_from_the_gpu_move_to_the_host() -> None:
    cached = EmbeddingCache(gpu_nbytes=10 * ROW_NBYTES, host_nbytes=10 * ROW_NBYTES)
    cached.start(Supervisor())
    for key, value in ((b"a", 1.0), (b"b", 2.0), (b"c", 3.0)):
        encoded = EncodedRows(torch.full((4, 8), value, device="cuda"))
        torch.cuda.synchronize()
        await cached.get_or_compute(key, Compute(encoded))
        await cached.flush()
    assert cached.stats().nbytes == {"gpu": 8 * ROW_NBYTES, "host": 4 * ROW_NBYTES}
    first = (await cached.get_or_compute(b"a", Compute(rows(0)))).rows_TW
    assert not first.is_cuda
    assert (first == 1.0).all()
