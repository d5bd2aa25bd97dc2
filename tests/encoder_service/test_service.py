"""The pipeline of a request without gRPC: order of events, failures, cancellation, content hashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.encoder_service.running import MAX_ITEMS, RunningEncoder, image, png, run_encoder
from tests.integration.media_server import serve_media
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.errors import BadRequest, TooManyItems, VitrineError
from vitrine_vlm.types import ExpectedTime, ItemTimings, Layout, LayoutEvent, MediaItem


@dataclass(frozen=True)
class Rows:
    item_index: int
    rows_TW: torch.Tensor
    timings: ItemTimings


@dataclass(frozen=True)
class ItemFailed:
    item_index: int
    error: VitrineError


Event = LayoutEvent | Rows | ItemFailed


class RecordedReplies:
    """Records the answers in the order in which they came; `arrived` counts them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.arrived = asyncio.Semaphore(0)
        self.shipments: list[RecordedShipment] = []

    async def layout(self, item_index: int, layout: Layout) -> None:
        self._add(LayoutEvent(item_index, layout))

    @contextmanager
    def shipment(self, item_index: int) -> Iterator[RecordedShipment]:
        self.shipments.append(RecordedShipment(item_index, self._add))
        yield self.shipments[-1]
        self.shipments[-1].closed = True

    async def failed(self, item_index: int, error: VitrineError) -> None:
        self._add(ItemFailed(item_index, error))

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.arrived.release()


class RecordedShipment:
    """A shipment and hook in one that records its calls."""

    def __init__(self, item_index: int, add: Callable[[Event], None]) -> None:
        self.hook = self
        self.enqueued: torch.Tensor | None = None
        self.ended = self.closed = False
        self._item_index = item_index
        self._add = add

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        self.enqueued = rows_TW

    def batch_ended(self) -> None:
        self.ended = True

    async def send(self, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        self._add(Rows(self._item_index, rows_TW, timings))


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path, max_queued_patches=300) as running:
        yield running


async def encode(encoder: RunningEncoder, *items: MediaItem, tenant: str = "") -> list[Event]:
    replies = RecordedReplies()
    await encoder.service.encode(items, replies, tenant)
    return replies.events


def rows_by_item(events: list[Event]) -> dict[int, Rows]:
    return {event.item_index: event for event in events if isinstance(event, Rows)}


async def test_encoded_media_in_work_is_bounded(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    picture, large = png(96, 64, 1), png(128, 96, 2)
    async with run_encoder(qwen3_vl_folder, tmp_path, max_held_bytes=len(picture) + 1) as encoder:
        encoder.tower.gate.clear()
        first = asyncio.create_task(encode(encoder, image(picture)))
        while not encoder.admission.num_patches:
            await asyncio.sleep(0.01)
        [refused] = await encode(encoder, image(large))
        assert isinstance(refused, ItemFailed) and refused.error.code == "overloaded"
        assert f"{len(picture)} bytes of requests, media and replies are in work" in str(refused.error)
        held = "vitrine_encoder_held_media_bytes"
        assert encoder.metrics.registry.get_sample_value(held) == len(picture)
        encoder.tower.gate.set()
        await first
        assert encoder.metrics.registry.get_sample_value(held) == 0
        # Alone it may be larger.
        assert rows_by_item(await encode(encoder, image(large)))


async def test_each_item_answers_with_its_layout_and_then_its_rows(encoder: RunningEncoder) -> None:
    pictures = [png(96, 64, 1), png(64, 64, 2), png(96, 64, 1)]
    events = await encode(encoder, *map(image, pictures))
    for index, picture in enumerate(pictures):
        first, second = (event for event in events if event.item_index == index)
        assert isinstance(first, LayoutEvent)
        assert isinstance(second, Rows)
        assert first.layout.num_tokens == len(second.rows_TW)
        assert (second.rows_TW - encoder.rows_of(picture)).abs().max() < 1e-4
        assert second.timings.preprocess_ms > 0
        assert second.timings.forward_ms > 0
    assert encoder.admission.num_patches == 0


async def test_the_layout_does_not_wait_for_the_tower(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    replies = RecordedReplies()
    call = asyncio.create_task(encoder.service.encode([image(png(96, 64))], replies))
    await asyncio.wait_for(replies.arrived.acquire(), 10)
    (layout,) = replies.events
    assert isinstance(layout, LayoutEvent)
    assert layout.layout.grid_thw == (1, 4, 6)
    encoder.tower.gate.set()
    await call
    assert isinstance(replies.events[1], Rows)


async def test_a_hook_follows_the_forward_of_its_rows_and_not_of_cached_ones(
    qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20) as encoder:
        made, kept = RecordedReplies(), RecordedReplies()
        for replies in (made, kept):
            await encoder.service.encode([image(png(96, 64))], replies)
        (shipment,) = made.shipments
        rows = rows_by_item(made.events)[0].rows_TW
        assert shipment.enqueued is not None and torch.equal(shipment.enqueued, rows)
        assert shipment.ended and shipment.closed
        assert [(other.enqueued, other.ended) for other in kept.shipments] == [(None, False)]
        assert torch.equal(rows_by_item(kept.events)[0].rows_TW, rows)


async def test_a_bad_item_fails_alone(encoder: RunningEncoder) -> None:
    events = await encode(encoder, image(png(64, 64)), image(b"no picture"), image(png(64, 96)))
    failed = [event for event in events if isinstance(event, ItemFailed)]
    assert [(event.item_index, event.error.code) for event in failed] == [(1, "not_an_image")]
    assert rows_by_item(events).keys() == {0, 2}


async def test_items_beyond_the_queue_are_refused_as_overload(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    busy = asyncio.create_task(encode(encoder, image(png(256, 256))))  # 256 of 300 patches
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    events = await encode(encoder, image(png(128, 128)))
    assert [event.error.code for event in events if isinstance(event, ItemFailed)] == ["overloaded"]
    encoder.tower.gate.set()
    assert len(await busy) == 2
    assert rows_by_item(await encode(encoder, image(png(128, 128)))).keys() == {0}


async def test_a_request_needs_items_and_not_too_many(encoder: RunningEncoder) -> None:
    with pytest.raises(BadRequest, match="no media items"):
        await encode(encoder)
    with pytest.raises(TooManyItems, match=f"{MAX_ITEMS + 1} media items: at most {MAX_ITEMS}"):
        await encode(encoder, *[image(png(64, 64))] * (MAX_ITEMS + 1))


async def test_items_load_at_the_same_time(encoder: RunningEncoder) -> None:
    async with serve_media() as server:
        server.files |= {"/hangs1": png(64, 64), "/hangs2": png(64, 96)}
        urls = [MediaItem("image", url=server.url(path)) for path in ("/hangs1", "/hangs2")]
        task = asyncio.create_task(encode(encoder, *urls))
        for _ in urls:  # both wait at the server before either is answered
            await asyncio.wait_for(server.num_waiting.acquire(), 10)
        server.released.set()
        assert rows_by_item(await task).keys() == {0, 1}


async def test_cancelling_stops_what_has_not_run(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    blocker = asyncio.create_task(encode(encoder, image(png(64, 64, 1))))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    async with serve_media() as server:
        slow = MediaItem("image", url=server.url("/hangs"))
        replies = RecordedReplies()
        call = asyncio.create_task(encoder.service.encode([slow, image(png(96, 64))], replies))
        await replies.arrived.acquire()
        await server.num_waiting.acquire()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert [type(event) for event in replies.events] == [LayoutEvent]
        assert encoder.admission.num_patches == 16, "only the blocker's patches are left"
    encoder.tower.gate.set()
    await blocker
    await encode(encoder, image(png(64, 64, 2)))
    assert encoder.tower.batches == [[(1, 4, 4)], [(1, 4, 4)]], "the cancelled request's image ran"
    cancelled = encoder.metrics.registry.get_sample_value(
        "vitrine_encoder_items_total", {"kind": "image", "outcome": "cancelled"}
    )
    assert cancelled == 2


async def test_equal_items_have_equal_hashes_and_others_do_not(encoder: RunningEncoder) -> None:
    async def hash_of(item: MediaItem) -> bytes:
        (layout,) = (event for event in await encode(encoder, item) if isinstance(event, LayoutEvent))
        assert len(layout.layout.content_hash) == 32
        return layout.layout.content_hash

    picture = png(64, 64, 1)
    async with serve_media() as server:
        server.files["/picture"] = picture
        by_url = await hash_of(MediaItem("image", url=server.url("/picture")))
    assert await hash_of(image(picture)) == by_url, "how the bytes arrive is no part of the content"
    assert await hash_of(image(png(64, 64, 2))) != by_url


async def test_an_internal_fault_shows_no_details(encoder: RunningEncoder, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(RecordedReplies):
        async def layout(self, item_index: int, layout: Layout) -> None:
            raise RuntimeError("a secret of the machine")

    replies = Broken()
    await encoder.service.encode([image(png(64, 64))], replies)
    failed = [event for event in replies.events if isinstance(event, ItemFailed)]
    assert [event.error.code for event in failed] == ["internal_error"]
    assert "secret" not in str(failed[0].error)
    assert "a secret of the machine" in caplog.text


def num_encoded(encoder: RunningEncoder) -> int:
    return sum(map(len, encoder.tower.batches))


async def test_equal_items_are_encoded_once_within_a_request_and_later(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20) as encoder:
        picture, other = png(96, 64, 1), png(96, 64, 2)
        first = rows_by_item(await encode(encoder, image(picture), image(picture), image(other)))
        assert torch.equal(first[0].rows_TW, first[1].rows_TW)
        assert not torch.equal(first[0].rows_TW, first[2].rows_TW)
        assert (first[0].rows_TW - encoder.rows_of(picture)).abs().max() < 1e-4
        assert num_encoded(encoder) == 2
        again = rows_by_item(await encode(encoder, image(picture)))
        assert torch.equal(again[0].rows_TW, first[0].rows_TW)
        assert again[0].timings.forward_ms == 0
        assert num_encoded(encoder) == 2


async def test_tenants_share_no_rows(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20) as encoder:
        for expected, tenant in ((1, "one"), (1, "one"), (2, "another"), (3, "")):
            events = await encode(encoder, image(png(96, 64)), tenant=tenant)
            assert [type(event) for event in events] == [LayoutEvent, Rows]
            assert num_encoded(encoder) == expected


async def test_cached_rows_are_served_where_the_queue_is_full(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, max_queued_patches=300, cache_bytes=1 << 20) as encoder:
        await encode(encoder, image(png(96, 64)))
        encoder.tower.gate.clear()
        busy = asyncio.create_task(encode(encoder, image(png(256, 256, 3))))
        while not encoder.admission.num_patches:
            await asyncio.sleep(0.01)
        assert rows_by_item(await encode(encoder, image(png(96, 64)))).keys() == {0}
        encoder.tower.gate.set()
        await busy


async def test_the_work_of_an_item_that_computes_after_all_is_counted(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    replies = RecordedReplies(), RecordedReplies()
    calls = []
    for each in replies:
        calls.append(asyncio.create_task(encoder.service.encode([image(png(96, 64))], each)))
        await asyncio.wait_for(each.arrived.acquire(), 10)
        assert encoder.admission.num_patches == 24, "the second waits for the first one's rows"
    calls[0].cancel()
    await asyncio.gather(calls[0], return_exceptions=True)
    await asyncio.sleep(0.05)
    assert encoder.admission.num_patches == 24
    encoder.tower.gate.set()
    await calls[1]
    assert rows_by_item(replies[1].events).keys() == {0}
    assert encoder.admission.num_patches == 0


async def test_a_layout_announces_how_long_the_rows_take(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    def expected(events: list[Event]) -> ExpectedTime | None:
        assert isinstance(events[0], LayoutEvent)
        return events[0].layout.expected

    cost = CostModel(0.0, 0.1, 0.0)  # 16 patches a picture
    async with run_encoder(qwen3_vl_folder, tmp_path, cost=cost, cache_bytes=1 << 20) as encoder:
        assert expected(await encode(encoder, image(png(64, 64, 1)))) is None, "no batch has run"
        second_time = expected(await encode(encoder, image(png(64, 64, 2))))
        assert second_time is not None and second_time.queue_s == 0.0
        assert second_time.encode_s == pytest.approx(1.5, rel=0.1)
        assert expected(await encode(encoder, image(png(64, 64, 2)))) is None, "the rows are cached"
        encoder.tower.gate.clear()
        first = asyncio.create_task(encode(encoder, image(png(64, 64, 3))))
        while not encoder.admission.num_patches:
            await asyncio.sleep(0.01)
        replies = RecordedReplies()
        second = asyncio.create_task(encoder.service.encode([image(png(64, 64, 4))], replies))
        await replies.arrived.acquire()
        announced = expected(replies.events)
        assert announced is not None and announced.queue_s > 1.0
        encoder.tower.gate.set()
        await asyncio.gather(first, second)
