"""Layouts, tickets and patches through EncoderClient, against real encoders and against older ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from tests.encoder_service.processed import patches_of
from tests.encoder_service.running import RunningEncoder, image, png, run_encoder
from tests.integration.media import clip
from tests.integration.media_server import serve_media
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.errors import (
    EncoderMismatch,
    InternalError,
    NotAnImage,
    Overloaded,
    TicketExpired,
    VitrineError,
)
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import EncodeEvent, Layout, LayoutEvent, MediaItem, MediaOptions, Patches, RowsEvent, Ticket


@asynccontextmanager
async def client_of(shm_folder: Path, *addresses: str) -> AsyncIterator[EncoderClient]:
    supervisor = Supervisor()
    client = EncoderClient(addresses, None, shm_folder=shm_folder, supervisor=supervisor)
    await client.start()
    await client.wait_ready(10)
    try:
        yield client
    finally:
        await client.close()
        assert supervisor.failure is None


@pytest.fixture
async def encoders(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[list[RunningEncoder]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20))
            for _ in range(2)
        ]


async def layouts_of(client: EncoderClient, *items: MediaItem, tenant: str = "") -> list[Layout]:
    found = {event.item_index: event.layout async for event in client.layouts(items, "r", tenant)}
    return [found[index] for index in range(len(items))]


async def rows_of(client: EncoderClient, *items: MediaItem, tenant: str = "") -> list[torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    async for event in client.encode(items, "r", tenant):
        if isinstance(event, RowsEvent):
            main, deepstack = torch.empty(event.rows.num_tokens, 96), torch.empty(3, event.rows.num_tokens, 96)
            event.rows.copy_to(main, deepstack, 0)
            event.rows.check()
            event.rows.release()
            rows[event.item_index] = torch.cat([main, *deepstack], dim=1)
    return [rows[index] for index in range(len(items))]


def claim(layout: Layout) -> MediaItem:
    return MediaItem(layout.kind, ticket=layout.ticket)


def num_tickets(encoders: list[RunningEncoder]) -> int:
    return sum(len(encoder.tickets) for encoder in encoders)


async def eventually_no_ticket(encoders: list[RunningEncoder]) -> None:
    async with asyncio.timeout(10):
        while num_tickets(encoders):
            await asyncio.sleep(0.01)


async def test_layouts_and_then_their_rows_at_the_encoder_that_has_them(
    encoders: list[RunningEncoder], qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    items = [
        *(image(png(64, 32 * side, side)) for side in range(2, 9)),
        MediaItem("video", data=clip(1, 96, 64, 9).data),
    ]
    items.append(MediaItem("image", patches=patches_of(qwen3_vl_folder, image(png(96, 96)), "uint8")))
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as gateway:
        layouts = await layouts_of(gateway, *items, tenant="t")
        assert [layout.num_tokens > 0 for layout in layouts] == [True] * len(items)
        ids = [layout.ticket.encoder_id for layout in layouts if layout.ticket is not None]
        assert len(ids) == len(items) and set(ids) == {encoder.tickets.encoder_id for encoder in encoders}
        assert [status.in_flight for status in gateway.status()] == [0, 0]
        # Equal items go where they went before.
        again = await layouts_of(gateway, *items, tenant="t")
        assert [layout.ticket.encoder_id for layout in again if layout.ticket is not None] == ids
        expected = await rows_of(gateway, *items, tenant="t")
    num_encoded = [sum(map(len, encoder.tower.batches)) for encoder in encoders]
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as worker:  # another process, say
        rows = await rows_of(worker, *map(claim, layouts), tenant="t")
        assert all(map(torch.equal, rows, expected))
        assert [sum(map(len, encoder.tower.batches)) for encoder in encoders] == num_encoded, (
            "not where they are cached"
        )
        mixed = await rows_of(worker, items[0], claim(layouts[1]), tenant="t")
        assert (mixed[0] - expected[0]).abs().max() < 1e-4 and torch.equal(mixed[1], expected[1])
        tickets = [layout.ticket for layout in (*layouts, *again) if layout.ticket is not None]
        await worker.release_tickets([*tickets, Ticket("another", bytes(16)), Ticket(ids[0], bytes(16))])
        assert num_tickets(encoders) == 0
        with pytest.raises(TicketExpired, match="ask for the layout again"):
            await rows_of(worker, claim(layouts[0]), tenant="t")
        assert [status.in_flight for status in worker.status()] == [0, 0]


async def test_a_claims_layout_is_that_of_its_ticket(encoders: list[RunningEncoder], tmp_path: Path) -> None:
    async with client_of(tmp_path, encoders[0].address) as client:
        (layout,) = await layouts_of(client, image(png(64, 64)))
        events: list[EncodeEvent] = [event async for event in client.encode([claim(layout)], "r")]
        assert events[0] == LayoutEvent(0, layout) and events[0].layout.ticket is None
        assert isinstance(events[1], RowsEvent)
        events[1].rows.release()
        (of_claim,) = await layouts_of(client, claim(layout))
        assert of_claim == layout and of_claim.ticket is None


async def test_a_ticket_of_an_encoder_that_is_not_connected_has_expired(
    encoders: list[RunningEncoder], tmp_path: Path
) -> None:
    async with client_of(tmp_path, encoders[0].address) as client:
        (layout,) = await layouts_of(client, image(png(64, 64)))
    async with client_of(tmp_path, encoders[1].address) as client:
        for ticket in (layout.ticket, Ticket("", bytes(16))):
            assert ticket is not None
            with pytest.raises(TicketExpired, match=f"encoder {ticket.encoder_id} of ticket {ticket.value.hex()}"):
                await rows_of(client, MediaItem("image", ticket=ticket), image(png(64, 64)))
        await client.release_tickets([layout.ticket] if layout.ticket else [])  # of no use, and no error
        assert client.status()[0].in_flight == 0
    assert not encoders[1].tower.batches


async def test_a_ticket_is_not_tried_elsewhere_once_its_encoder_is_lost(
    encoders: list[RunningEncoder], tmp_path: Path
) -> None:
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as client:
        (layout,) = await layouts_of(client, image(png(64, 64)))
        assert layout.ticket is not None
        (holder,) = (each for each in encoders if each.tickets.encoder_id == layout.ticket.encoder_id)
        (other,) = (each for each in encoders if each is not holder)
        holder.tower.gate.clear()
        call = asyncio.create_task(rows_of(client, claim(layout)))
        assert await asyncio.to_thread(holder.tower.entered.wait, 10)
        await holder.server.stop(0)
        with pytest.raises(TicketExpired, match="is not connected"):
            await call
        holder.tower.gate.set()
        assert not other.tower.batches
        await client.release_tickets([layout.ticket])
        assert [status.in_flight for status in client.status()] == [0, 0]


async def test_an_encoder_that_drains_claims_nothing(encoders: list[RunningEncoder], tmp_path: Path) -> None:
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as client:
        (layout,) = await layouts_of(client, image(png(64, 64)))
        assert layout.ticket is not None
        for encoder in encoders:
            if encoder.tickets.encoder_id == layout.ticket.encoder_id:
                encoder.exporter.start_draining()
        async with asyncio.timeout(5):
            while all(status.ready for status in client.status()):
                await asyncio.sleep(0.01)
        with pytest.raises(TicketExpired, match="shuts down"):
            await rows_of(client, claim(layout))
        (elsewhere,) = await layouts_of(client, image(png(64, 64)))
        assert elsewhere.ticket is not None and elsewhere.ticket.encoder_id != layout.ticket.encoder_id


async def test_an_overloaded_encoder_keeps_its_ticket(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path, max_queued_patches=300) as encoder,
        client_of(tmp_path, encoder.address) as client,
    ):
        (layout,) = await layouts_of(client, image(png(128, 128)))
        encoder.tower.gate.clear()
        busy = asyncio.create_task(rows_of(client, image(png(256, 256))))
        assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
        with pytest.raises(Overloaded):
            await rows_of(client, claim(layout))
        encoder.tower.gate.set()
        await busy
        assert len(await rows_of(client, claim(layout))) == 1


async def test_layouts_are_retried_elsewhere(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    """An encoder without memory for further media refuses; the other one takes all items."""
    items = [image(png(64, 32 * side, side)) for side in range(2, 9)]
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as free,
        run_encoder(qwen3_vl_folder, tmp_path, max_held_bytes=1) as full,
        client_of(tmp_path, full.address) as other,
        client_of(tmp_path, free.address, full.address) as client,
    ):
        await layouts_of(other, image(png(64, 64)))
        layouts = await layouts_of(client, *items)
        assert {layout.ticket and layout.ticket.encoder_id for layout in layouts} == {free.tickets.encoder_id}
        assert client.stats().retries == 1 and len(full.tickets) == 1


async def test_layouts_that_are_not_read_leave_no_ticket(encoders: list[RunningEncoder], tmp_path: Path) -> None:
    items = [image(png(64, 32 * side, side)) for side in range(2, 9)]
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as client, serve_media() as server:
        # One that fails ends the request; those that came before were not read by then, or are the caller's.
        read: list[Ticket] = []
        with pytest.raises(NotAnImage):
            async for event in client.layouts([*items, image(b"no picture")], "r"):
                assert event.layout.ticket is not None
                read.append(event.layout.ticket)
        await client.release_tickets(read)
        await eventually_no_ticket(encoders)

        slow = MediaItem("image", url=server.url("/hangs"))
        async with aclosing(client.layouts([*items, slow], "r")) as events:
            first = await anext(events)
            async with asyncio.timeout(5):
                while sum(status.in_flight for status in client.status()) > 1:  # all but the slow one have arrived
                    await asyncio.sleep(0.01)
            assert num_tickets(encoders) == len(items)
        assert first.layout.ticket is not None
        await client.release_tickets([first.layout.ticket])
        await eventually_no_ticket(encoders)


async def test_equal_patches_go_to_the_same_encoder(
    encoders: list[RunningEncoder], qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    items = [
        MediaItem("image", patches=patches_of(qwen3_vl_folder, image(png(64, 64, seed)), "uint8")) for seed in range(8)
    ]
    async with client_of(tmp_path, *(encoder.address for encoder in encoders)) as client:
        # One by one: in one request, the bound on the load of an encoder sends some elsewhere.
        first = [(await rows_of(client, item))[0] for item in items]
        again = [(await rows_of(client, item))[0] for item in items]
        assert all(map(torch.equal, first, again))
    assert sum(len(batch) for encoder in encoders for batch in encoder.tower.batches) == len(items)


NEW_ITEMS = {
    "patches": MediaItem("image", patches=Patches(b"0", "uint8", False, (1, 2, 2))),
    "ticket": MediaItem("image", ticket=Ticket("encoder", bytes(16))),
}


class LastMinor(StubServicer):
    """Describes itself as an encoder of minor version 1."""

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        description = await super().Describe(request, context)
        description.protocol_minor_version = 1
        return description


@pytest.mark.parametrize(
    "item",
    [
        MediaItem("image", data=b"5", options=MediaOptions(max_pixels=4096)),
        MediaItem("video", frames=(MediaItem("image", data=b"5"),)),
    ],
    ids=["options", "frames"],
)
async def test_an_encoder_without_options_gets_no_item_that_has_some(
    encoders: list[RunningEncoder], tmp_path: Path, item: MediaItem
) -> None:
    identity = replace(IDENTITY, model=encoders[0].identity.model)
    async with running_stub(tmp_path, identity, servicer_class=LastMinor) as (address, servicer, _):
        async with client_of(tmp_path, address) as client:
            with pytest.raises(EncoderMismatch, match=f"version 1.2 of the protocol, but {address} has 1.1: update"):
                await rows_of(client, item)
            assert servicer.num_encodes == 0
            # A rate alone, which it knows, is no hindrance.
            rate = MediaItem("image", data=b"5", options=MediaOptions(fps=2.0))
            async with aclosing(client.encode([rate], "r")) as events:
                async for event in events:
                    if isinstance(event, RowsEvent):
                        event.rows.release()
            assert servicer.num_encodes == 1
        async with client_of(tmp_path, address, encoders[0].address) as client:
            for seed in range(6):
                options = MediaOptions(max_pixels=4096 + seed)
                assert await rows_of(client, MediaItem("image", data=png(64, 64, seed), options=options))
        assert servicer.num_encodes == 1


async def test_an_older_encoder_is_named_with_what_to_do(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _), client_of(tmp_path, address) as client:
        update = f"need encoders with version 1.1 of the protocol, but {address} has 1.0: update them"
        with pytest.raises(EncoderMismatch, match=update):
            await layouts_of(client, MediaItem("image", data=b"a 5"))
        with pytest.raises(EncoderMismatch, match=update):
            await rows_of(client, NEW_ITEMS["patches"])
        with pytest.raises(TicketExpired, match="not known here"):
            await rows_of(client, NEW_ITEMS["ticket"])
        assert servicer.num_encodes == 0 and client.status()[0].in_flight == 0
        assert len([event async for event in client.encode([MediaItem("image", data=b"a 5")], "r")]) == 2


async def test_beside_an_older_encoder_the_new_one_does_it(
    encoders: list[RunningEncoder], qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    old = replace(IDENTITY, model=encoders[0].identity.model)
    async with running_stub(tmp_path, old) as (address, servicer, _):
        async with client_of(tmp_path, address, encoders[0].address) as client:
            for seed in range(6):
                assert await layouts_of(client, image(png(64, 64, seed)))
            patches = patches_of(qwen3_vl_folder, image(png(64, 64)), "uint8")
            assert len(await rows_of(client, MediaItem("image", patches=patches))) == 1
        assert servicer.num_encodes == 0


class Answers(StubServicer):
    """Describes itself as new and answers with `responses`."""

    responses: list[encoder_pb2.EncodeResponse]

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        description = await super().Describe(request, context)
        description.protocol_minor_version, description.instance_id = 1, "id"
        return description

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        for response in self.responses:
            yield response


def layout(**changes: object) -> encoder_pb2.EncodeResponse:
    fields: dict[str, object] = {
        "item_index": 0,
        "grid_thw": [1, 2, 10],
        "num_tokens": 5,
        "ticket": bytes(16),
    } | changes
    return encoder_pb2.EncodeResponse(layout=encoder_pb2.Layout(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("responses", "error"),
    [
        ([layout(ticket=b"")], InternalError),
        ([layout(ticket=bytes(15))], InternalError),
        ([layout(ticket=bytes(1 << 20))], InternalError),
        ([layout(item_index=1)], InternalError),
        ([layout(), layout()], InternalError),
        ([layout(), encoder_pb2.EncodeResponse(ready=encoder_pb2.Ready())], InternalError),
        ([layout(), encoder_pb2.EncodeResponse(chunk=encoder_pb2.Chunk(data=b"1234"))], InternalError),
        ([], VitrineError),
    ],
    ids=range(8),
)
async def test_the_layouts_of_an_encoder_are_checked(
    tmp_path: Path, responses: list[encoder_pb2.EncodeResponse], error: type[VitrineError]
) -> None:
    async with running_stub(tmp_path, servicer_class=Answers) as (address, servicer, _):
        assert isinstance(servicer, Answers)
        servicer.responses = responses
        async with client_of(tmp_path, address) as client:
            with pytest.raises(error):
                await layouts_of(client, MediaItem("image", data=b"a 5"))
            assert client.status()[0].in_flight == 0
