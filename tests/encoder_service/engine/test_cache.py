"""Equal items are made once; bytes stay within bounds; failures and cancellations do not stick."""

from __future__ import annotations

import asyncio

import pytest
import torch

from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache, MadeRows
from vitrine_vlm.errors import NotAnImage, Overloaded
from vitrine_vlm.service_runtime.supervisor import Supervisor

ROW_NBYTES = 4 * 8


def rows(num_tokens: int, value: float = 0.0) -> MadeRows:
    return MadeRows(torch.full((num_tokens, 8), value), preprocess_ms=1.0, queue_ms=2.0, forward_ms=3.0)


class Maker:
    """Counts its calls; waits for `gate`."""

    def __init__(self, made: MadeRows | Exception) -> None:
        self.made = made
        self.num_calls = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> MadeRows:
        self.num_calls += 1
        await self.gate.wait()
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


def cache(num_rows: int) -> EmbeddingCache:
    kept = EmbeddingCache(gpu_nbytes=0, host_nbytes=num_rows * ROW_NBYTES)
    kept.start(Supervisor())
    return kept


async def test_the_second_time_rows_are_kept_ones() -> None:
    kept, make = cache(10), Maker(rows(4, 5.0))
    first, second = await kept.rows(b"a", make), await kept.rows(b"a", make)
    assert make.num_calls == 1
    assert torch.equal(first.rows_TW, second.rows_TW)
    assert (first.forward_ms, second.forward_ms) == (3.0, 0.0)
    await kept.settled()
    stats = kept.stats()
    assert (stats.hits, stats.joined, stats.misses, stats.nbytes["host"]) == (1, 0, 1, 4 * ROW_NBYTES)


async def test_the_least_recently_used_rows_leave_and_bytes_stay_within_bounds() -> None:
    kept = cache(10)
    makers = {key: Maker(rows(4)) for key in (b"a", b"b", b"c")}
    for key in (b"a", b"b", b"a", b"c"):  # b is the oldest when c comes
        await kept.rows(key, makers[key])
        await kept.settled()
    assert [kept.knows(key) for key in (b"a", b"b", b"c")] == [True, False, True]
    assert kept.stats().nbytes["host"] == 8 * ROW_NBYTES
    assert kept.stats().evictions == 1
    await kept.rows(b"b", makers[b"b"])
    assert makers[b"b"].num_calls == 2


async def test_rows_larger_than_the_cache_are_handed_out_and_not_kept() -> None:
    kept = cache(10)
    await kept.rows(b"a", Maker(rows(4)))
    assert len((await kept.rows(b"b", Maker(rows(11)))).rows_TW) == 11
    await kept.settled()
    assert (kept.knows(b"a"), kept.knows(b"b")) == (True, False)


async def test_a_view_keeps_only_its_own_bytes() -> None:
    batch = torch.arange(800.0).view(100, 8)
    kept = cache(10)
    await kept.rows(b"a", Maker(MadeRows(batch[10:14])))
    await kept.settled()
    again = (await kept.rows(b"a", Maker(rows(0)))).rows_TW
    assert torch.equal(again, batch[10:14])
    assert again.untyped_storage().nbytes() == 4 * ROW_NBYTES


@pytest.mark.parametrize("num_rows", [0, 100])
async def test_equal_items_in_flight_are_made_once(num_rows: int) -> None:
    kept, make = cache(num_rows), Maker(rows(4, 7.0))
    make.gate.clear()
    asked = [asyncio.create_task(kept.rows(b"a", make)) for _ in range(5)]
    await asyncio.sleep(0)
    assert kept.knows(b"a")
    make.gate.set()
    assert [float(made.rows_TW[0, 0]) for made in await asyncio.gather(*asked)] == [7.0] * 5
    assert make.num_calls == 1
    assert (kept.stats().joined, kept.stats().misses) == (4, 1)
    await kept.settled()
    assert kept.knows(b"a") == bool(num_rows)


async def test_if_the_maker_fails_all_fail_alike_and_the_next_tries_anew() -> None:
    kept, make = cache(10), Maker(NotAnImage("damaged"))
    make.gate.clear()
    asked = [asyncio.create_task(kept.rows(b"a", make)) for _ in range(3)]
    await asyncio.sleep(0)
    make.gate.set()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [NotAnImage] * 3
    assert make.num_calls == 1
    assert len((await kept.rows(b"a", Maker(rows(4)))).rows_TW) == 4


async def test_if_the_maker_is_refused_another_makes_them() -> None:
    """Its request may end sooner than those of the others."""
    kept, refused, make = cache(10), Maker(Overloaded("no time")), Maker(rows(4))
    refused.gate.clear()
    first = asyncio.create_task(kept.rows(b"a", refused))
    await asyncio.sleep(0)
    others = [asyncio.create_task(kept.rows(b"a", make)) for _ in range(2)]
    await asyncio.sleep(0)
    refused.gate.set()
    with pytest.raises(Overloaded):
        await first
    assert [len(made.rows_TW) for made in await asyncio.gather(*others)] == [4, 4]
    assert make.num_calls == 1


async def test_if_the_maker_is_cancelled_another_makes_them() -> None:
    kept, make = cache(10), Maker(rows(4))
    make.gate.clear()
    first = asyncio.create_task(kept.rows(b"a", make))
    await asyncio.sleep(0)
    others = [asyncio.create_task(kept.rows(b"a", make)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0.01)
    make.gate.set()
    for other in others:
        assert len((await other).rows_TW) == 4
    assert make.num_calls == 2


async def test_nobody_makes_them_where_all_are_cancelled_at_once() -> None:
    kept, make = cache(10), Maker(rows(4))
    make.gate.clear()
    asked = [asyncio.create_task(kept.rows(b"a", make)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in asked:
        task.cancel()
    await asyncio.wait(asked, timeout=0.1)
    make.gate.set()  # lets them end that should have ended
    await asyncio.wait(asked)
    assert [task.cancelled() for task in asked] == [True] * 3
    assert make.num_calls == 1
    assert not kept.knows(b"a")


async def test_one_who_waits_can_be_cancelled_alone() -> None:
    kept, make = cache(10), Maker(rows(4))
    make.gate.clear()
    first = asyncio.create_task(kept.rows(b"a", make))
    await asyncio.sleep(0)
    second = asyncio.create_task(kept.rows(b"a", make))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    make.gate.set()
    assert len((await first).rows_TW) == 4
    assert make.num_calls == 1


@pytest.mark.gpu
async def test_what_leaves_the_gpu_moves_to_the_host() -> None:
    kept = EmbeddingCache(gpu_nbytes=10 * ROW_NBYTES, host_nbytes=10 * ROW_NBYTES)
    kept.start(Supervisor())
    for key, value in ((b"a", 1.0), (b"b", 2.0), (b"c", 3.0)):
        made = MadeRows(torch.full((4, 8), value, device="cuda"))
        torch.cuda.synchronize()
        await kept.rows(key, Maker(made))
        await kept.settled()
    assert kept.stats().nbytes == {"gpu": 8 * ROW_NBYTES, "host": 4 * ROW_NBYTES}
    first = (await kept.rows(b"a", Maker(rows(0)))).rows_TW
    assert not first.is_cuda
    assert (first == 1.0).all()
