"""Rows that are computed before they are claimed: by a real tower on the CPU, and no more than there are places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.encoder_service.running import RunningEncoder, image_message, png, run_encoder
from tests.encoder_service.test_patches import layouts_of, rows_of
from tests.encoder_service.test_server import eventually, stub
from tests.encoder_service.test_tickets import PICTURE, claim, encode, failures, held
from vitrine_vlm.protos.encoder.v1 import encoder_pb2

PLACES = 2
# Pictures by their grids, which name them in the batches.
SIZES = {(1, 4, 2 * width): (32 * width, 64) for width in (2, 3, 4, 5, 6)}


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20, compute_ahead=PLACES) as running:
        yield running


async def tickets_of(encoder: RunningEncoder, *pictures: bytes, tenant: str = "", ahead: bool = True) -> list[bytes]:
    """The tickets of pictures whose layouts are asked for one after the other."""
    tickets = []
    for picture in pictures:
        request = encoder_pb2.EncodeRequest(
            items=[image_message(picture)], tenant=tenant, layout_only=True, compute_ahead=ahead
        )
        responses = [response async for response in stub(encoder).Encode(request)]
        tickets.append(layouts_of(responses)[0].ticket)
    return tickets


async def release(encoder: RunningEncoder, *tickets: bytes) -> None:
    await stub(encoder).Release(encoder_pb2.ReleaseRequest(tickets=tickets))


def computed(encoder: RunningEncoder) -> list[tuple[int, ...]]:
    return [tuple(grid) for batch in encoder.tower.batches for grid in batch]


def num_computed(encoder: RunningEncoder) -> int:
    """Items whose batch has ended."""
    return int(encoder.metrics.registry.get_sample_value("vitrine_encoder_batch_items_sum") or 0)


def outcomes(encoder: RunningEncoder) -> tuple[int, int]:
    """Tickets that were computed ahead and claimed, and those that were not claimed."""
    values = [
        encoder.metrics.registry.get_sample_value("vitrine_encoder_ahead_tickets_total", {"outcome": outcome})
        for outcome in ("claimed", "unclaimed")
    ]
    claimed, unclaimed = (int(value or 0) for value in values)
    return claimed, unclaimed


async def test_the_tower_has_run_before_the_claim(encoder: RunningEncoder) -> None:
    (ticket,) = await tickets_of(encoder, PICTURE)
    await eventually(lambda: num_computed(encoder) == 1)
    assert outcomes(encoder) == (0, 0)
    rows_TW = rows_of(await encode(encoder, [claim(ticket)]), 0, 384)
    assert (rows_TW - encoder.rows_of(PICTURE)).abs().max() < 1e-4
    assert len(computed(encoder)) == 1 and outcomes(encoder) == (1, 0)
    await release(encoder, ticket)
    assert held(encoder) == (0, 0, 0) and outcomes(encoder) == (1, 0) and encoder.admission.num_patches == 0


async def test_layouts_of_other_callers_leave_the_tower_alone(encoder: RunningEncoder) -> None:
    await tickets_of(encoder, PICTURE, ahead=False)
    await encode(encoder, [image_message(png(64, 64))])
    assert computed(encoder) == [(1, 4, 4)]


async def test_a_claim_joins_the_forward_that_runs_and_outlives_its_ticket(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    (ticket,) = await tickets_of(encoder, PICTURE)
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    call = asyncio.create_task(encode(encoder, [claim(ticket)]))
    await eventually(lambda: outcomes(encoder) == (1, 0))
    await release(encoder, ticket)
    encoder.tower.gate.set()
    assert len(rows_of(await call, 0, 384)) == 6
    assert len(computed(encoder)) == 1


async def test_without_claims_no_more_is_computed_than_there_are_places(encoder: RunningEncoder) -> None:
    """The oldest come first; each claim, and each end of a ticket, frees a place."""
    grids = [*SIZES]
    tickets = await tickets_of(encoder, *(png(*size) for size in SIZES.values()))
    await eventually(lambda: num_computed(encoder) == PLACES)
    await encode(encoder, [image_message(png(64, 96))])  # behind all that has a place
    assert sorted(computed(encoder)) == sorted([*grids[:PLACES], (1, 6, 4)])
    assert encoder.admission.num_patches == 0

    assert not failures(await encode(encoder, [claim(tickets[0])]))
    await eventually(lambda: num_computed(encoder) == 4)
    assert computed(encoder)[3] == grids[2]
    await release(encoder, tickets[3])  # which had none
    assert outcomes(encoder) == (1, 0)
    await release(encoder, tickets[1])
    await eventually(lambda: num_computed(encoder) == 5)
    assert computed(encoder)[4] == grids[4] and outcomes(encoder) == (1, 1)
    await release(encoder, *tickets)
    assert held(encoder) == (0, 0, 0) and outcomes(encoder) == (1, 3)


async def test_asking_for_its_layout_again_claims_no_rows(encoder: RunningEncoder) -> None:
    """Nor does a claim that is refused."""
    tickets = await tickets_of(encoder, *(png(*size) for size in SIZES.values()))
    await eventually(lambda: num_computed(encoder) == PLACES)
    for ticket in tickets:
        again = encoder_pb2.EncodeRequest(items=[claim(ticket)], layout_only=True, compute_ahead=True)
        layouts = layouts_of([response async for response in stub(encoder).Encode(again)])
        assert layouts[0].num_tokens and not layouts[0].ticket
        assert failures(await encode(encoder, [claim(ticket, encoder_pb2.MEDIA_KIND_VIDEO)]))
    await encode(encoder, [image_message(png(64, 96))])  # behind all that has a place
    assert num_computed(encoder) == PLACES + 1 and outcomes(encoder) == (0, 0)
    await release(encoder, *tickets)
    assert held(encoder) == (0, 0, 0)


async def test_a_claim_of_a_ticket_without_a_place_computes_it_once(encoder: RunningEncoder) -> None:
    pictures = [png(*size) for size in SIZES.values()]
    tickets = await tickets_of(encoder, *pictures)
    for ticket in reversed(tickets):
        assert not failures(await encode(encoder, [claim(ticket)]))
    assert sorted(computed(encoder)) == sorted(SIZES)
    assert outcomes(encoder) == (PLACES, 0)


async def test_unclaimed_rows_expire_and_leave_the_place_to_others(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(
        qwen3_vl_folder, tmp_path, cache_bytes=1 << 20, compute_ahead=1, ticket_ttl_s=0.4
    ) as encoder:
        await tickets_of(encoder, PICTURE)
        await eventually(lambda: held(encoder) == (0, 0, 0) and outcomes(encoder) == (0, 1))
        await tickets_of(encoder, png(64, 64))
        await eventually(lambda: held(encoder) == (0, 0, 0) and outcomes(encoder) == (0, 2))
        await eventually(lambda: encoder.admission.num_patches == 0)
        assert [*encoder.exporter.stats().pool_used_nbytes.values()] == [0], "only claims take room of the pool"


async def test_a_ticket_that_ends_takes_its_item_out_of_the_queue(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    busy = asyncio.create_task(encode(encoder, [image_message(PICTURE)]))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    tickets = await tickets_of(encoder, *(png(*size) for size in SIZES.values()))
    await release(encoder, *tickets)
    await eventually(lambda: encoder.admission.num_patches == 24)
    encoder.tower.gate.set()
    await busy
    (ticket,) = await tickets_of(encoder, png(64, 96))
    await eventually(lambda: num_computed(encoder) == 2)
    assert computed(encoder) == [(1, 4, 6), (1, 6, 4)] and outcomes(encoder) == (0, 5)
    await release(encoder, ticket)
    assert held(encoder) == (0, 0, 0)


async def test_where_it_fails_the_claim_computes_the_rows_and_the_place_is_free(encoder: RunningEncoder) -> None:
    encoder.tower.error = RuntimeError("the test's")
    tickets = await tickets_of(encoder, *(png(*size) for size in SIZES.values()))
    await eventually(lambda: len(computed(encoder)) == len(SIZES))
    await eventually(lambda: encoder.admission.num_patches == 0)
    encoder.tower.error = None
    assert not failures(await encode(encoder, [*map(claim, tickets)]))
    assert outcomes(encoder) == (0, 0)


async def test_a_full_queue_leaves_the_rows_to_the_claim(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(
        qwen3_vl_folder, tmp_path, cache_bytes=1 << 20, compute_ahead=PLACES, max_queued_patches=300
    ) as encoder:
        encoder.tower.gate.clear()
        busy = asyncio.create_task(encode(encoder, [image_message(png(256, 256))]))
        assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
        (ticket,) = await tickets_of(encoder, png(128, 128))
        encoder.tower.gate.set()
        await busy
        assert computed(encoder) == [(1, 16, 16)]
        assert not failures(await encode(encoder, [claim(ticket)]))


async def test_tenants_share_no_rows(encoder: RunningEncoder) -> None:
    await tickets_of(encoder, PICTURE, tenant="one")
    await tickets_of(encoder, PICTURE, tenant="two")
    await eventually(lambda: num_computed(encoder) == 2)


@pytest.mark.parametrize("is_released_first", [False, True])
async def test_a_cancelled_claim_takes_its_item_out_of_the_queue(
    encoder: RunningEncoder, is_released_first: bool
) -> None:
    """With the end of the ticket nothing waits for the rows any more, whether or not they were begun ahead."""
    encoder.tower.gate.clear()
    busy = asyncio.create_task(encode(encoder, [image_message(png(96, 64))]))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    (ticket,) = await tickets_of(encoder, PICTURE)
    await eventually(lambda: encoder.admission.num_patches == 48)
    call = stub(encoder).Encode(encoder_pb2.EncodeRequest(items=[claim(ticket)]))
    await call.read()
    await eventually(lambda: outcomes(encoder) == (1, 0))
    if is_released_first:
        await release(encoder, ticket)
    call.cancel()
    await release(encoder, ticket)
    try:
        await eventually(lambda: encoder.admission.num_patches == 24)
    finally:
        encoder.tower.gate.set()
        await busy
