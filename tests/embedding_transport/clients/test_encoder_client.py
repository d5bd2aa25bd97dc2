"""EncoderClient against a real server over loopback: rows equal to the bit, errors named, nothing leaked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub, synthetic_rows
from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer
from vitrine_vlm.embedding_transport.fleet import pool_mapper
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import (
    EncoderMismatch,
    EncoderUnavailable,
    InternalError,
    LeaseExpired,
    NotAnImage,
    Overloaded,
    TransportUnavailable,
)
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import LayoutEvent, MediaItem, ModelIdentity, RowsEvent


def item(text: str) -> MediaItem:
    return MediaItem("image", data=text.encode())


async def encode_all(client: EncoderClient, items: list[MediaItem]) -> dict[int, RowsEvent]:
    rows = {}
    async for event in client.encode(items, "request"):
        if isinstance(event, RowsEvent):
            rows[event.item_index] = event
        else:
            assert isinstance(event, LayoutEvent)
            assert event.item_index not in rows
    return rows


def landed(event: RowsEvent, identity: ModelIdentity) -> torch.Tensor:
    """Returns all rows, copied by copy_to in two parts and joined again: [num_tokens, row_width]."""
    num_tokens, hidden, layers = event.rows.num_tokens, identity.out_hidden_size, len(identity.deepstack_visual_indexes)
    main = torch.zeros(num_tokens, hidden, dtype=DTYPES[identity.dtype])
    deepstack = torch.zeros(layers, num_tokens, hidden, dtype=DTYPES[identity.dtype])
    split = num_tokens // 3
    event.rows.copy_to(main[:split], deepstack[:, :split], 0)
    event.rows.copy_to(main[split:], deepstack[:, split:], split)
    event.rows.check()
    return torch.cat([main, *deepstack], dim=1)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_rows_arrive_bit_for_bit(tmp_path: Path, transport: TransportChoice, dtype: str) -> None:
    identity = replace(IDENTITY, dtype=dtype, out_hidden_size=512)
    items = [item("a 7"), item("b 1200"), item("c 1")]  # 1200 rows are several chunks
    async with running_stub(tmp_path, identity, pool_bytes=64 << 20) as (address, servicer, _):
        client = EncoderClient([address], identity, transport=transport, shm_folder=tmp_path)
        await client.start()
        rows = await encode_all(client, items)
        for index, expected in enumerate(items):
            assert expected.data is not None
            num_tokens = int(expected.data.split()[-1])
            assert torch.equal(landed(rows[index], identity), synthetic_rows(expected.data, num_tokens, identity))
            assert rows[index].rows.timings.forward_ms == 5
            rows[index].rows.release()
            rows[index].rows.release()
        await client.close()
        stats = servicer.exporter.stats()
        assert stats.live_leases == 0
        assert stats.shipped_nbytes[transport] == client.stats().received_nbytes[transport] > 0


async def test_auto_prefers_shared_memory_and_falls_back_counted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with running_stub(tmp_path) as (address, _, _):
        for folder, transport, fallbacks in ((tmp_path, "shm", 0), (elsewhere, "grpc", 1)):
            client = EncoderClient([address], IDENTITY, shm_folder=folder)
            await client.start()
            assert client.status()[0].transport == transport
            assert client.stats().fallbacks == fallbacks
            await client.close()


async def test_strict_shared_memory_fails_loudly(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for server_folder in (tmp_path, None):
        async with running_stub(server_folder) as (address, _, _):
            client = EncoderClient([address], IDENTITY, transport="shm", shm_folder=elsewhere)
            with pytest.raises(TransportUnavailable):
                await client.start()
            await client.close()


async def test_a_client_that_has_lost_a_loop_fails_its_calls_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(peer: EncoderPeer, stub: object) -> NoReturn:
        raise ValueError("by accident")

    monkeypatch.setattr(EncoderPeer, "_release_leases", broken)
    async with running_stub(tmp_path) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await asyncio.sleep(0.05)
        with pytest.raises(EncoderUnavailable, match="releases ended with ValueError"):
            [event async for event in client.encode([MediaItem("image", data=b"4")], "r")]
        await client.close()


async def test_a_pool_that_cannot_be_mapped_for_any_reason_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(pool_mapper, "ShmMapping", refuse)
    async with running_stub(tmp_path) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        assert client.status()[0].transport == "grpc"
        await client.close()
        client = EncoderClient([address], IDENTITY, transport="shm", shm_folder=tmp_path)
        with pytest.raises(TransportUnavailable, match="out of memory"):
            await client.start()
        await client.close()


@pytest.mark.parametrize(("said", "transport"), [("carrier_pigeon", "auto"), ("shm", "grpc"), ("grpc", "shm")])
async def test_a_transport_that_the_client_does_not_accept_is_refused(
    tmp_path: Path, said: str, transport: TransportChoice
) -> None:
    class OfItsOwnMind(StubServicer):
        async def Connect(self, request_iterator, context):  # type: ignore[no-untyped-def]
            await anext(aiter(request_iterator))  # or the client might write on a call that has ended
            session = encoder_pb2.Session(session_id="session", transport=said, lease_ttl_s=30)
            yield encoder_pb2.ConnectResponse(session=session)

    async with running_stub(tmp_path, servicer_class=OfItsOwnMind) as (address, _, _):
        client = EncoderClient([address], IDENTITY, transport=transport, shm_folder=tmp_path)
        with pytest.raises(TransportUnavailable, match=said):
            await client.start()
        await client.close()


async def test_an_error_behind_the_last_rows_takes_nothing_from_them(tmp_path: Path) -> None:
    class LateFailure(StubServicer):
        async def Encode(self, request, context):  # type: ignore[no-untyped-def]
            async for response in super().Encode(request, context):
                yield response
            await abort(context, InternalError("too late"))

    async with running_stub(tmp_path, servicer_class=LateFailure) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        rows = await encode_all(client, [item("a 5"), item("b 3")])
        assert [rows[index].rows.num_tokens for index in range(2)] == [5, 3]
        await client.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("revision", "other"),
        ("model_type", "qwen2_5_vl"),
        ("out_hidden_size", 9),
        ("deepstack_visual_indexes", (1, 2)),
        ("dtype", "bfloat16"),
        ("protocol_version", 99),
    ],
)
async def test_mismatch_names_the_field_and_both_values(tmp_path: Path, field: str, value: object) -> None:
    async with running_stub(tmp_path) as (address, _, _):
        expected = replace(IDENTITY, **{field: value})  # type: ignore[arg-type]
        client = EncoderClient([address], expected, shm_folder=tmp_path)
        with pytest.raises(EncoderMismatch, match=field) as caught:
            await client.start()
        assert repr(value) in str(caught.value) and repr(getattr(IDENTITY, field)) in str(caught.value)
        await client.close()


async def test_a_failed_item_raises_its_error_and_unread_rows_are_released(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        with pytest.raises(NotAnImage, match="no image: bad"):
            async for event in client.encode([item("a 5"), item("bad 1")], "request"):
                if isinstance(event, RowsEvent):
                    event.rows.release()
        await client.close()
        assert servicer.exporter.stats().live_leases == 0


async def test_no_encoder_is_an_error_with_the_address(tmp_path: Path) -> None:
    client = EncoderClient(["127.0.0.1:9"], IDENTITY, shm_folder=tmp_path, connect_timeout_s=1)
    await client.start()
    assert not client.ready
    with pytest.raises(EncoderUnavailable, match=r"127\.0\.0\.1:9"):
        await encode_all(client, [item("a 5")])
    await client.close()


async def test_a_lost_encoder_is_replaced_within_the_request_and_layouts_are_not_repeated(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second:
        client = EncoderClient([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        layouts: list[int] = []
        rows: dict[int, RowsEvent] = {}
        items = [item("a 3"), item("hang 4")]
        async for event in client.encode(items, "request"):
            if isinstance(event, RowsEvent):
                rows[event.item_index] = event
                continue
            layouts.append(event.item_index)
            if event.item_index == 1:
                busy, idle = (first, second) if first[1].hangs else (second, first)
                idle[1].go_on.set()
                await busy[2].stop(None)
        assert sorted(layouts) == [0, 1]
        assert torch.equal(landed(rows[1], IDENTITY), synthetic_rows(b"hang 4", 4, IDENTITY))
        assert client.stats().retries == 1
        await client.close()


async def test_reconnects_to_an_encoder_that_comes_back(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
    async with asyncio.timeout(5):
        while client.ready:
            await asyncio.sleep(0.01)
    async with running_stub(tmp_path, port=int(address.rpartition(":")[2])):
        await client.wait_ready(10)
        assert await encode_all(client, [item("a 5")])
    await client.close()


async def test_leases_expire_and_the_reader_notices(tmp_path: Path) -> None:
    async with running_stub(tmp_path, lease_ttl_s=0.2) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        rows = await encode_all(client, [item("a 5")])
        landed(rows[0], IDENTITY)
        async with asyncio.timeout(5):
            while servicer.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        with pytest.raises(LeaseExpired):
            landed(rows[0], IDENTITY)
        assert servicer.exporter.stats().leases.expired == 1
        await client.close()


async def test_leases_are_reclaimed_when_the_client_is_gone(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await encode_all(client, [item("a 5"), item("b 6")])
        assert servicer.exporter.stats().live_leases == 2
        await client.close()
        async with asyncio.timeout(5):
            while servicer.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        assert servicer.exporter.stats().leases.reclaimed == 2


async def test_a_full_pool_waits_for_a_release(tmp_path: Path) -> None:
    async with running_stub(tmp_path, pool_bytes=16 << 10) as (address, _, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        held = await encode_all(client, [item("a 100")])  # 12800 of 16384 bytes
        waiting = asyncio.create_task(encode_all(client, [item("b 100")]))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        held[0].rows.release()
        async with asyncio.timeout(5):
            rows = await waiting
        assert torch.equal(landed(rows[0], IDENTITY), synthetic_rows(b"b 100", 100, IDENTITY))
        await client.close()


async def test_load_is_bounded_and_equal_content_goes_to_the_same_encoder(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second:
        client = EncoderClient([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        for _ in range(4):
            await encode_all(client, [item("same 5")])
        assert sorted([first[1].num_encodes, second[1].num_encodes]) == [0, 4]

        hanging = [asyncio.create_task(encode_all(client, [item("hang same 5")])) for _ in range(8)]
        async with asyncio.timeout(5):
            while first[1].num_encodes + second[1].num_encodes < 12:
                await asyncio.sleep(0.01)
        assert max(status.in_flight for status in client.status()) <= 5
        for stub in (first, second):
            stub[1].go_on.set()
        await asyncio.gather(*hanging)
        await client.close()


async def test_cancelled_requests_leave_no_load_behind(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second:
        client = EncoderClient([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)
        hanging = [asyncio.create_task(encode_all(client, [item("hang same 5")] * 3)) for _ in range(4)]
        async with asyncio.timeout(5):
            while first[1].num_items + second[1].num_items < 12:
                await asyncio.sleep(0.01)
        assert sum(status.in_flight for status in client.status()) == 12
        assert max(status.in_flight for status in client.status()) <= 8
        for each in hanging:
            each.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        assert [status.in_flight for status in client.status()] == [0, 0]
        for stub in (first, second):
            stub[1].go_on.set()
        await client.close()


def busy_servicer(retry_after_s: float) -> type[StubServicer]:
    class BusyServicer(StubServicer):
        async def Encode(self, request, context):  # type: ignore[no-untyped-def]
            self.num_encodes += 1
            failed = encoder_pb2.Failed(item_index=0, code="overloaded", message="full", retry_after_s=retry_after_s)
            yield encoder_pb2.EncodeResponse(failed=failed)

    return BusyServicer


async def test_an_overloaded_encoder_is_skipped(tmp_path: Path) -> None:
    async with running_stub(tmp_path, servicer_class=busy_servicer(3.0)) as busy, running_stub(tmp_path) as idle:
        client = EncoderClient([busy[0], idle[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)
        for number in range(32):  # some of them would go to the busy one
            rows = await encode_all(client, [item(f"{number} 5")])
            assert torch.equal(landed(rows[0], IDENTITY), synthetic_rows(f"{number} 5".encode(), 5, IDENTITY))
        assert busy[1].num_encodes == client.stats().retries > 0
        await client.close()


async def test_if_all_are_overloaded_the_shortest_retry_time_is_reported(tmp_path: Path) -> None:
    slow, soon = busy_servicer(9.0), busy_servicer(2.0)
    async with running_stub(tmp_path, servicer_class=slow) as one, running_stub(tmp_path, servicer_class=soon) as other:
        client = EncoderClient([one[0], other[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)
        with pytest.raises(Overloaded) as refused:
            await encode_all(client, [item("a 5")])
        assert refused.value.retry_after_s == 2.0
        await client.close()


async def test_items_of_a_request_are_spread_and_each_goes_where_it_went_before(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second:
        client = EncoderClient([first[0], second[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)
        items = [item(f"{name} {length}") for length, name in enumerate("abcdefgh", start=1)]
        rows = await encode_all(client, items)
        for index, each in enumerate(items):
            assert each.data is not None
            assert torch.equal(landed(rows[index], IDENTITY), synthetic_rows(each.data, index + 1, IDENTITY))
        assert min(first[1].num_items, second[1].num_items) >= 2
        assert (first[1].num_encodes, second[1].num_encodes) == (1, 1)
        for each in items:  # alone, load never stands in the way of the one that has it cached
            await encode_all(client, [each])
        before = first[1].num_items
        for each in items:
            await encode_all(client, [each])
        again = first[1].num_items - before
        for each in items:
            await encode_all(client, [each])
        assert first[1].num_items - before == 2 * again
        assert [status.in_flight for status in client.status()] == [0, 0]
        await client.close()


async def test_encoders_come_and_go_under_load_and_nothing_is_lost(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as first, running_stub(tmp_path) as second, running_stub(tmp_path) as third:
        client = EncoderClient([], IDENTITY, shm_folder=tmp_path)
        await client.start()
        with pytest.raises(EncoderUnavailable, match="none was found"):
            await encode_all(client, [item("a 5")])
        client.set_addresses([first[0]])
        await client.wait_ready(10)

        async def ask(name: str) -> None:
            for index in range(60):
                asked = [item(f"{name} {index} {length}") for length in (1, 40)]
                rows = await encode_all(client, asked)
                for position, each in enumerate(asked):
                    assert each.data is not None
                    expected = synthetic_rows(each.data, rows[position].rows.num_tokens, IDENTITY)
                    assert torch.equal(landed(rows[position], IDENTITY), expected)
                    await asyncio.sleep(0.002)  # rows are held while their encoder may be disconnected
                    rows[position].rows.release()

        asking = asyncio.gather(*(ask(name) for name in "abcd"))
        for addresses in ([first[0], second[0]], [second[0]], [second[0], third[0]], [third[0]], [first[0], third[0]]):
            client.set_addresses(addresses)
            await asyncio.sleep(0.05)
            assert {status.address for status in client.status()} == set(addresses)
        await asking
        assert min(stub[1].num_items for stub in (first, second, third)) > 0
        async with asyncio.timeout(30):
            while second[1].exporter.stats().sessions:  # it was disconnected
                await asyncio.sleep(0.01)
            while any(stub[1].exporter.stats().live_leases for stub in (first, second, third)):
                await asyncio.sleep(0.01)
        await client.close()
        for stub in (first, second, third):
            assert stub[1].exporter.stats().leases.reclaimed == 0, "rows were taken back that were still held"


async def test_requests_wait_for_those_that_replace_all_others(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as old, running_stub(tmp_path) as new:
        client = EncoderClient([old[0]], IDENTITY, shm_folder=tmp_path)
        await client.start()
        client.set_addresses([new[0]])
        [event] = (await encode_all(client, [item("a 5")])).values()
        event.rows.release()
        assert new[1].num_items == 1
        client.set_addresses(["127.0.0.1:1"])  # nothing listens there
        with pytest.raises(EncoderUnavailable, match=r"127\.0\.0\.1:1: failed to connect"):
            await asyncio.wait_for(encode_all(client, [item("a 5")]), 10)
        await client.close()


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_an_encoder_that_drains_and_leaves_finishes_what_it_has(tmp_path: Path, leaves_first: bool) -> None:
    """As with a pod that ends: it is removed from the list and drained, in either order."""
    async with running_stub(tmp_path) as (address, servicer, _):
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        asking = asyncio.create_task(encode_all(client, [item("a 5"), item("hang 5")]))
        async with asyncio.timeout(5):
            while not servicer.hangs:
                await asyncio.sleep(0.01)
        peer = next(iter(client._peers.values()))
        if leaves_first:
            client.set_addresses([])
        servicer.exporter.start_draining()
        async with asyncio.timeout(5):
            while peer.connection is not None:
                await asyncio.sleep(0.01)
        client.set_addresses([])
        await asyncio.sleep(0.3)  # several polls of whether it can be disconnected
        servicer.go_on.set()
        rows = await asyncio.wait_for(asking, 5)
        await asyncio.sleep(0.3)
        for event in rows.values():
            landed(event, IDENTITY)
            event.rows.release()
        async with asyncio.timeout(5):
            while servicer.exporter.stats().sessions:
                await asyncio.sleep(0.01)
        assert servicer.exporter.stats().leases.reclaimed == 0
        await client.close()


async def test_closing_ends_the_connection_of_an_encoder_that_was_taken_off_just_before(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _):
        supervisor = Supervisor()
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path, supervisor=supervisor)
        await client.start()
        client.set_addresses([])
        await client.close()
        assert supervisor.names() == []
        async with asyncio.timeout(5):
            while servicer.exporter.stats().sessions:
                await asyncio.sleep(0.01)


async def test_leases_of_several_sessions_stay_counted_until_they_are_released(tmp_path: Path) -> None:
    """Leases of an earlier session, and of the one that ends while they are released."""
    async with running_stub(tmp_path, servicer_class=_SlowRelease) as (address, servicer, _):
        assert isinstance(servicer, _SlowRelease)
        client = EncoderClient([address], IDENTITY, shm_folder=tmp_path)
        await client.start()
        peer = next(iter(client._peers.values()))
        peer.num_leases = 2
        peer.release("of an earlier session", 1)
        peer.release("of another one", 2)
        async with asyncio.timeout(5):
            await servicer.is_asked.wait()
        await client.close()
        assert peer.num_leases == 0


class _SlowRelease(StubServicer):
    """The first Release is not answered before it is cancelled."""

    def __init__(self, exporter: RowExporter, identity: ModelIdentity) -> None:
        super().__init__(exporter, identity)
        self.is_asked = asyncio.Event()

    async def Release(self, request, context):  # type: ignore[no-untyped-def]
        if not self.is_asked.is_set():
            self.is_asked.set()
            await asyncio.Event().wait()
        return await super().Release(request, context)
