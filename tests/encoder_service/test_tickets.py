"""Layouts alone and the rows that are claimed by their tickets: over gRPC, and the table of tickets by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, settings
from tests.encoder_service.processed import patches_of
from tests.encoder_service.running import RunningEncoder, image, png, run_encoder
from tests.encoder_service.test_patches import layouts_of, rows_of
from tests.encoder_service.test_server import eventually, stub
from tests.encoder_service.test_service import RecordedReplies
from tests.integration.media import clip
from tests.integration.media_server import serve_media
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.encoder_service.tickets import OpenedItem, TicketTable
from vitrine_vlm.errors import Overloaded, TicketExpired
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import Layout, MediaItem

IMAGE, VIDEO = encoder_pb2.MEDIA_KIND_IMAGE, encoder_pb2.MEDIA_KIND_VIDEO
PICTURE = png(96, 64, 1)


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20) as running:
        yield running


async def encode(
    encoder: RunningEncoder, items: Sequence[encoder_pb2.MediaItem], tenant: str = "", layout_only: bool = False
) -> list[encoder_pb2.EncodeResponse]:
    request = encoder_pb2.EncodeRequest(items=items, tenant=tenant, layout_only=layout_only)
    return [response async for response in stub(encoder).Encode(request)]


async def tickets_of(encoder: RunningEncoder, *items: MediaItem, tenant: str = "") -> list[bytes]:
    layouts = layouts_of(await encode(encoder, [*map(item_to_proto, items)], tenant, layout_only=True))
    return [layouts[index].ticket for index in range(len(items))]


def claim(ticket: bytes, kind: encoder_pb2.MediaKind.ValueType = IMAGE) -> encoder_pb2.MediaItem:
    return encoder_pb2.MediaItem(kind=kind, ticket=ticket)


def failures(responses: list[encoder_pb2.EncodeResponse]) -> dict[int, encoder_pb2.Failed]:
    return {r.failed.item_index: r.failed for r in responses if r.WhichOneof("event") == "failed"}


def held(encoder: RunningEncoder) -> tuple[int, int, int]:
    """Live tickets, their bytes, and all bytes of media, by the metrics."""
    values = [
        encoder.metrics.registry.get_sample_value(f"vitrine_encoder_{name}")
        for name in ("tickets_live", "ticket_bytes", "held_media_bytes")
    ]
    tickets, ticket_bytes, media_bytes = (int(value or 0) for value in values)
    return tickets, ticket_bytes, media_bytes


async def test_layouts_come_without_the_tower_and_claims_give_the_rows(
    encoder: RunningEncoder, qwen3_vl_folder: Path
) -> None:
    video = clip(2, 96, 64, 21)
    items = [image(PICTURE), MediaItem("video", data=video.data)]
    items.append(MediaItem("image", patches=patches_of(qwen3_vl_folder, image(png(64, 64)), "uint8")))
    alone = await encode(encoder, [*map(item_to_proto, items)], layout_only=True)
    assert [response.WhichOneof("event") for response in alone] == ["layout"] * 3
    layouts = layouts_of(alone)
    tickets = [layouts[index].ticket for index in range(3)]
    assert len(set(tickets)) == 3 and {len(ticket) for ticket in tickets} == {16}
    assert encoder.tower.batches == [] and encoder.admission.num_patches == 0
    outcome = {"kind": "image", "outcome": "layout"}
    assert encoder.metrics.registry.get_sample_value("vitrine_encoder_items_total", outcome) == 2

    claims = [claim(tickets[0]), claim(tickets[1], VIDEO), claim(tickets[2]), item_to_proto(image(png(64, 96)))]
    claimed = await encode(encoder, claims)  # a request may mix
    whole = await encode(encoder, [*map(item_to_proto, items)])
    for index in range(3):
        of_item = [r for r in claimed if getattr(r, r.WhichOneof("event") or "").item_index == index]
        assert of_item[0].WhichOneof("event") == "layout"
        assert torch.equal(rows_of(claimed, index, 384), rows_of(whole, index, 384))
        layouts[index].ticket = b""
        assert layouts_of(claimed)[index] == layouts[index] == layouts_of(whole)[index]
    assert len(rows_of(claimed, 3, 384)) == 6
    assert sum(map(len, encoder.tower.batches)) == 4


async def test_a_ticket_is_claimed_as_often_as_one_likes_at_once_and_without_the_cache(
    qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=0) as encoder:
        for data, kind in ((PICTURE, IMAGE), (clip(2, 96, 64, 9).data, VIDEO)):
            item = MediaItem("image" if kind == IMAGE else "video", data=data)
            (ticket,) = await tickets_of(encoder, item)
            expected = rows_of(await encode(encoder, [item_to_proto(item)]), 0, 384)
            calls = await asyncio.gather(*(encode(encoder, [claim(ticket, kind)] * 2) for _ in range(4)))
            calls.append(await encode(encoder, [claim(ticket, kind)]))
            for responses in calls:
                assert (rows_of(responses, 0, 384) - expected).abs().max() < 1e-4
        assert held(encoder)[0] == 2


async def test_claims_join_a_forward_in_flight(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, image(PICTURE))
    encoder.tower.gate.clear()
    calls = [asyncio.create_task(encode(encoder, [claim(ticket)])) for _ in range(3)]
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    layouts = await encode(encoder, [item_to_proto(image(PICTURE))], layout_only=True)  # nothing here waits for it
    assert layouts_of(layouts)[0].num_tokens == 6
    encoder.tower.gate.set()
    for responses in await asyncio.gather(*calls):
        assert len(rows_of(responses, 0, 384)) == 6
    assert sum(map(len, encoder.tower.batches)) == 1


async def test_unknown_tickets_and_those_of_another_tenant_are_refused_alike(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, image(PICTURE), tenant="one")
    other = bytes(16)
    for wrong, tenant in ((ticket, "another"), (ticket, ""), (other, "one"), (b"", "one"), (bytes(1000), "one")):
        responses = await encode(encoder, [claim(wrong), item_to_proto(image(PICTURE))], tenant)
        (failed,) = failures(responses).values()
        assert (failed.item_index, failed.code) == (0, "ticket_expired")
        assert f"ticket {wrong[:16].hex()} is not known" in failed.message
        assert "ask for the layout again" in failed.message and len(failed.message) < 300
        assert layouts_of(responses).keys() == {1}
    assert not failures(await encode(encoder, [claim(ticket)], "one"))


async def test_a_ticket_of_the_other_kind_is_refused(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, image(PICTURE))
    (failed,) = failures(await encode(encoder, [claim(ticket, VIDEO)])).values()
    assert (failed.code, "of kind video, its ticket of kind image" in failed.message) == ("invalid_request", True)
    assert held(encoder) == (1, len(PICTURE), len(PICTURE))


async def test_a_layout_of_a_ticket_has_no_other_ticket(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, image(PICTURE))
    (response,) = await encode(encoder, [claim(ticket)], layout_only=True)
    assert (response.layout.num_tokens, response.layout.ticket) == (6, b"")
    assert held(encoder)[0] == 1


async def test_released_tickets_hold_nothing_and_unknown_ones_are_no_error(encoder: RunningEncoder) -> None:
    await encode(encoder, [item_to_proto(image(PICTURE))])
    tickets = await tickets_of(encoder, image(PICTURE), image(png(64, 64)))  # rows that are cached may be evicted
    nbytes = len(PICTURE) + len(png(64, 64))
    assert held(encoder) == (2, nbytes, nbytes)
    stats = await stub(encoder).GetStats(encoder_pb2.GetStatsRequest())
    assert (stats.num_live_tickets, stats.ticket_bytes) == (2, nbytes)
    release = encoder_pb2.ReleaseRequest(tickets=[tickets[1], tickets[1], bytes(16), b""])
    assert (await stub(encoder).Release(release)).num_released == 0  # leases
    assert held(encoder) == (1, len(PICTURE), len(PICTURE))
    assert failures(await encode(encoder, [claim(tickets[1])]))[0].code == "ticket_expired"
    await stub(encoder).Release(encoder_pb2.ReleaseRequest(tickets=tickets))
    assert held(encoder) == (0, 0, 0)


async def test_tickets_expire(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, ticket_ttl_s=0.4) as encoder:
        (ticket,) = await tickets_of(encoder, image(PICTURE))
        assert not failures(await encode(encoder, [claim(ticket)]))
        await eventually(lambda: held(encoder) == (0, 0, 0))
        failed = failures(await encode(encoder, [claim(ticket)]))[0]
        assert failed.code == "ticket_expired" and "older than 0.4 s (--ticket-ttl-s)" in failed.message


async def test_a_claim_in_flight_outlives_its_ticket(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, image(PICTURE))
    encoder.tower.gate.clear()
    call = asyncio.create_task(encode(encoder, [claim(ticket)]))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    await stub(encoder).Release(encoder_pb2.ReleaseRequest(tickets=[ticket]))
    assert held(encoder) == (0, 0, len(PICTURE)), "its bytes are still in memory"
    encoder.tower.gate.set()
    assert len(rows_of(await call, 0, 384)) == 6
    await eventually(lambda: held(encoder) == (0, 0, 0))


async def test_tickets_fill_the_budget_of_media_bytes(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, max_held_bytes=3 * len(PICTURE)) as encoder:
        tickets = await tickets_of(encoder, image(PICTURE), image(PICTURE))
        failed = failures(await encode(encoder, [item_to_proto(image(PICTURE))], layout_only=True))[0]
        assert (failed.code, "peer '127.0.0.1' hold" in failed.message) == ("overloaded", True)
        assert not failures(await encode(encoder, [item_to_proto(image(PICTURE))])), "a third of it is left"
        assert failures(await encode(encoder, [item_to_proto(image(png(100, 100)))]))[0].code == "overloaded"
        assert not failures(await encode(encoder, [*map(claim, tickets)])), "claims need no further bytes"
        await stub(encoder).Release(encoder_pb2.ReleaseRequest(tickets=tickets[:1]))
        assert not failures(await encode(encoder, [item_to_proto(image(PICTURE))], layout_only=True))


def test_a_ticket_of_a_small_file_counts_what_is_kept_of_it(tmp_path: Path) -> None:
    budget, table = ByteBudget(1 << 20), TicketTable("encoder", 10.0)
    preprocessor = Preprocessor(settings(tmp_path, "qwen3_vl", QWEN3_IMAGE), MediaLimits())
    opened = preprocessor.open("image", PICTURE)
    for layout, nbytes in ((opened.layout, 4096), (replace(opened.layout, timestamps_s=(0.0,) * 1000), 132_096)):
        reserved = budget.item()
        reserved.reserve(100)
        ticket = table.issue(OpenedItem(opened, layout, reserved), "tenant")
        reserved.release()
        assert table.nbytes == budget.reserved_nbytes == nbytes
        table.release([ticket.value])
        assert table.nbytes == budget.reserved_nbytes == 0


def test_one_tenant_leaves_room_for_the_tickets_of_others(tmp_path: Path) -> None:
    """Also behind a gateway, which is one peer."""
    budget, table = ByteBudget(30 * len(PICTURE)), TicketTable("encoder", 10.0)

    def issue(tenant: str, peer: str) -> bytes:
        item = opened_item(tmp_path, budget)
        try:
            return table.issue(item, tenant, peer).value
        finally:
            item.reserved.release()

    def fill(tenant: str, peer: str) -> list[bytes]:
        issued: list[bytes] = []
        with pytest.raises(Overloaded, match="hold"):
            while True:
                issued.append(issue(tenant, peer))
        return issued

    first = fill("greedy", "gateway")
    assert len(first) == 20, "two thirds"
    assert budget.reserved_nbytes == table.nbytes == 20 * len(PICTURE), "what is refused is released"
    with pytest.raises(Overloaded, match="peer 'gateway'"):
        issue("modest", "gateway")
    with pytest.raises(Overloaded, match="tenant 'greedy'"):
        issue("greedy", "worker")
    assert issue("modest", "worker")
    table.release(first[:5])
    assert issue("modest", "gateway"), "as soon as there is room in its share"
    table.release([*table._issued])
    assert not (budget.reserved_nbytes or table.nbytes or table._held_by_peer or table._held_by_tenant)


async def test_layouts_are_sent_where_the_queue_is_full(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, max_queued_patches=300) as encoder:
        encoder.tower.gate.clear()
        busy = asyncio.create_task(encode(encoder, [item_to_proto(image(png(256, 256)))]))
        assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
        (ticket,) = await tickets_of(encoder, image(png(128, 128)))
        assert failures(await encode(encoder, [claim(ticket)]))[0].code == "overloaded"
        encoder.tower.gate.set()
        await busy
        assert not failures(await encode(encoder, [claim(ticket)]))


async def test_a_cancelled_call_leaves_no_ticket(encoder: RunningEncoder) -> None:
    """The second item hangs in its load, so that the call is cancelled behind the first layout."""
    async with serve_media() as server:
        slow = MediaItem("image", url=server.url("/hangs"))
        request = encoder_pb2.EncodeRequest(items=[*map(item_to_proto, (image(PICTURE), slow))], layout_only=True)
        call = stub(encoder).Encode(request)
        first = await call.read()
        assert isinstance(first, encoder_pb2.EncodeResponse) and first.layout.ticket
        await server.num_waiting.acquire()
        assert held(encoder)[0] == 1
        call.cancel()
        await eventually(lambda: held(encoder) == (0, 0, 0))


class Blocks(RecordedReplies):
    """Its peer reads nothing."""

    async def layout(self, item_index: int, layout: Layout) -> None:
        await super().layout(item_index, layout)
        await asyncio.Event().wait()


async def test_a_call_that_is_cancelled_before_its_layout_left_leaves_no_ticket(encoder: RunningEncoder) -> None:
    replies = Blocks()
    call = asyncio.create_task(encoder.service.layouts([image(PICTURE)], replies))
    await replies.arrived.acquire()
    assert held(encoder)[0] == 1
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert held(encoder) == (0, 0, 0)


def opened_item(folder: Path, budget: ByteBudget) -> OpenedItem:
    preprocessor = Preprocessor(settings(folder, "qwen3_vl", QWEN3_IMAGE), MediaLimits())
    opened, reserved = preprocessor.open("image", PICTURE), budget.item()
    reserved.reserve(len(PICTURE))
    return OpenedItem(opened, opened.layout, reserved)


def test_tickets_expire_in_their_order_and_not_a_moment_late(tmp_path: Path) -> None:
    now, budget = [0.0], ByteBudget(1 << 20)
    table = TicketTable("encoder", 10.0, lambda: now[0])
    tickets = []
    for moment in (0.0, 4.0, 8.0):
        now[0] = moment
        item = opened_item(tmp_path, budget)
        tickets.append(table.issue(item, "tenant").value)
        item.reserved.release()
    assert table.nbytes == budget.reserved_nbytes == 3 * len(PICTURE)
    now[0] = 10.0
    with pytest.raises(TicketExpired):  # also where the loop is late
        table.opened(tickets[0], "tenant")
    table.opened(tickets[1], "tenant").reserved.release()
    assert (table.expire(), len(table), table.nbytes) == (1, 2, 2 * len(PICTURE))
    table.release([tickets[2]])
    now[0] = 14.0
    assert (table.expire(), len(table), table.nbytes, budget.reserved_nbytes) == (1, 0, 0, 0)


def test_a_renewed_ticket_expires_as_if_it_were_issued_then(tmp_path: Path) -> None:
    now, budget = [0.0], ByteBudget(1 << 20)
    table = TicketTable("encoder", 10.0, lambda: now[0])
    tickets = []
    for _ in range(2):
        item = opened_item(tmp_path, budget)
        tickets.append(table.issue(item, "tenant").value)
        item.reserved.release()
    now[0] = 6.0
    table.renew(tickets[0])
    table.renew(b"unknown")
    now[0] = 10.0
    assert (table.expire(), len(table), table.nbytes) == (1, 1, len(PICTURE)), "that behind it, which was not renewed"
    table.opened(tickets[0], "tenant").reserved.release()
    now[0] = 16.0
    assert (table.expire(), len(table), table.nbytes, budget.reserved_nbytes) == (1, 0, 0, 0)


async def test_layouts_alone_renew_the_tickets_of_their_tenant(encoder: RunningEncoder) -> None:
    first, second = await tickets_of(encoder, image(PICTURE), image(PICTURE), tenant="mine")
    table = encoder.tickets
    assert list(table._issued) == [first, second], "the first expires first"
    refused = failures(await encode(encoder, [claim(first)], "other", layout_only=True))
    assert refused[0].code == "ticket_expired" and list(table._issued) == [first, second]
    [renewed] = await encode(encoder, [claim(first)], "mine", layout_only=True)
    assert renewed.WhichOneof("event") == "layout" and not renewed.layout.ticket, "it keeps the one that it has"
    assert list(table._issued) == [second, first]


async def test_the_supervisor_owns_the_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    table, supervisor = TicketTable("encoder", 0.04), Supervisor()
    monkeypatch.setattr(table, "expire", lambda: 1 / 0)
    table.start(supervisor)
    failure = await asyncio.wait_for(supervisor.failed(), 5)
    assert failure.name == "ticket expiry" and isinstance(failure.error, ZeroDivisionError)
    await table.close()
