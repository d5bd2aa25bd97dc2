"""An encoder that announces far longer times than the others: items go elsewhere, within a budget."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from tests.encoder_service.running import image, png, run_encoder
from vitrine_vlm.embedding_transport.clients import item_moves
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.clients.item_moves import ItemMoves
from vitrine_vlm.encoder_service.engine import tower_speed
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.types import ExpectedTime, Layout, MediaItem, RowsEvent

PICTURE = Layout("image", (1, 40, 50), 500)
USUAL = ExpectedTime(0.02, 0.005)
LONG = ExpectedTime(0.3, 0.05)


def item(text: str) -> MediaItem:
    return MediaItem("image", data=text.encode())


async def encode(client: EncoderClient, *texts: str) -> None:
    """Rows of these items, released at once."""
    num_rows = 0
    async for event in client.encode([item(text) for text in texts], "request"):
        if isinstance(event, RowsEvent):
            event.rows.check()
            event.rows.release()
            num_rows += 1
    assert num_rows == len(texts)


@asynccontextmanager
async def two_encoders(
    shm_folder: Path, servicer_class: type[StubServicer] = StubServicer
) -> AsyncIterator[tuple[EncoderClient, StubServicer, StubServicer]]:
    """A client that knows what its two encoders usually announce, and the two."""
    async with (
        running_stub(shm_folder, servicer_class=servicer_class) as one,
        running_stub(shm_folder, servicer_class=servicer_class) as other,
    ):
        for servicer in (one[1], other[1]):
            servicer.encode_s = 0.001
        client = EncoderClient([one[0], other[0]], IDENTITY, shm_folder=shm_folder)
        await client.start()
        await client.wait_ready(10)
        for number in range(12):
            await encode(client, f"before {number} 5")
        assert one[1].num_encodes and other[1].num_encodes
        yield client, one[1], other[1]
        await client.close()
        for servicer in (one[1], other[1]):
            assert servicer.exporter.stats().live_leases == 0


async def test_items_leave_a_slow_encoder_and_come_back_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_moves, "_PASSED_OVER_S", 0.5)
    async with two_encoders(tmp_path) as (client, slow, fast):
        slow.encode_s, before = 60.0, slow.num_encodes
        started = time.monotonic()
        for number in range(24):
            await encode(client, f"{number} 5")
        num_left = slow.num_encodes - before
        assert 0 < num_left < 5, "it is passed over once it has announced a minute"
        assert client.stats().moved == num_left and client.stats().retries == 0
        assert time.monotonic() - started < 30
        assert [status.in_flight for status in client.status()] == [0, 0]
        async with asyncio.timeout(5):
            while slow.num_running:  # the calls that were left were cancelled
                await asyncio.sleep(0.01)
        slow.encode_s, before, moved = 0.001, slow.num_encodes, client.stats().moved
        await asyncio.sleep(0.5)
        for number in range(24):
            await encode(client, f"after {number} 5")
        assert slow.num_encodes > before + 1 and client.stats().moved == moved
        assert fast.num_running == 0


class SlowAfterFirstRows(StubServicer):
    """Announces a longer time for each item of a call but the first."""

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        self.encode_s = 0.001
        async for response in super().Encode(request, context):
            yield response
            if response.WhichOneof("event") == "ready":
                self.encode_s = 0.2


async def test_a_call_that_has_brought_rows_stays(tmp_path: Path) -> None:
    """Cancelling it would end their leases."""
    servicer: type[StubServicer] = SlowAfterFirstRows  # type: ignore[type-abstract]
    async with two_encoders(tmp_path, servicer) as (client, _, _):
        started = time.monotonic()
        await encode(client, *(f"{number} 5" for number in range(4)))
        assert time.monotonic() - started > 0.2, "one encoder had two items at least"
        assert client.stats().moved == 0


async def test_the_only_encoder_is_not_left(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        servicer.encode_s = 0.001
        for number in range(6):
            await encode(client, f"{number} 5")
        servicer.encode_s = 0.3
        await encode(client, "late 5")
        assert client.stats().moved == 0 and servicer.num_encodes == 7
        await client.close()


async def test_tickets_are_of_the_encoder_that_is_not_slow(
    qwen3_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real encoders, one of which takes a patch for a second of work."""
    monkeypatch.setattr(tower_speed, "_KNOWN_FOR_S", 60.0)
    async with (
        run_encoder(qwen3_vl_folder, tmp_path, cost=CostModel(0.0, 1e-5, 0.0)) as fast,
        run_encoder(qwen3_vl_folder, tmp_path, cost=CostModel(0.0, 1.0, 0.0)) as slow,
    ):
        client = EncoderClient([slow.address], None, shm_folder=tmp_path)
        await client.start()
        for address in (slow.address, fast.address):  # each announces from its first batch on
            client.set_addresses([address])
            await client.wait_ready(10)
            await encode_picture(client, 99)
        for number in range(90, 98):
            await encode_picture(client, number)
        client.set_addresses([fast.address, slow.address])
        async with asyncio.timeout(10):
            while not all(status.ready for status in client.status()):
                await asyncio.sleep(0.01)
        found = set()
        for number in range(8):
            async for event in client.layouts([image(png(64, 64, number))], "r"):
                assert event.layout.ticket is not None
                found.add(event.layout.ticket.encoder_id)
        assert found == {fast.tickets.encoder_id} and client.stats().moved == 1
        async with asyncio.timeout(5):
            while len(slow.tickets):  # that of the call that was left is released
                await asyncio.sleep(0.01)
        await client.close()


async def encode_picture(client: EncoderClient, number: int) -> None:
    """A picture of its own for each number."""
    async for event in client.encode([image(png(64, 64, number))], "r"):
        if isinstance(event, RowsEvent):
            event.rows.release()


def known(expected: ExpectedTime = USUAL) -> ItemMoves:
    moves = ItemMoves()
    for _ in range(16):
        moves.is_long(PICTURE, expected, 1)
    return moves


def test_what_is_long_is_far_above_what_was_announced_lately() -> None:
    moves = known()
    assert not moves.is_long(PICTURE, ExpectedTime(0.1, 0.005), 1), "a queue like many"
    assert moves.is_long(PICTURE, LONG, 1)
    assert not moves.is_long(PICTURE, LONG, 8), "in front of it are seven items of the same client"
    video = Layout("video", (40, 40, 50), 20_000)
    assert not moves.is_long(video, ExpectedTime(0.02, 0.25), 1), "a long item takes long anywhere"
    assert not ItemMoves().is_long(PICTURE, LONG, 1), "nothing to compare with"


def test_where_all_are_slow_that_is_usual() -> None:
    moves = known()
    found = [moves.is_long(PICTURE, LONG, 1) for _ in range(40)]
    assert found[0] and not any(found[10:])


def test_one_of_ten_calls_may_leave_its_encoder() -> None:
    moves, num_moves = known(), 0
    for number in range(200):
        moves.add_call()
        num_moves += moves.move(f"encoder-{number}", 2, 1000, 0.0)
    assert num_moves == pytest.approx(5 + 20, abs=1)
    assert moves.num_moved == 2 * num_moves


def test_a_quarter_of_the_encoders_is_passed_over_at_most() -> None:
    moves = known()
    assert [moves.move(address, 1, 8, 10.0) for address in "abc"] == [True, True, False]
    assert set(moves.passed_over(10.0)) == {"a", "b"}
    assert moves.move("a", 1, 8, 12.0), "another call was there already"
    assert set(moves.passed_over(15.5)) == {"a"} and not moves.passed_over(17.5)
