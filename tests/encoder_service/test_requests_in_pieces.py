"""Encoders take requests in pieces, and clients send large ones so to those that do."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.encoder_service.running import RunningEncoder, image, png, run_encoder
from vitrine_vlm.embedding_transport.clients import encoder_client
from vitrine_vlm.embedding_transport.clients.encode_method import encode_in_pieces_method
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.wire import pieces_context, request_pieces
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.encoder_service import codec
from vitrine_vlm.errors import BadRequest, Overloaded, TooManyItems
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import MediaItem, RowsEvent

PICTURES = [png(96, 64), png(64, 64, seed=1)]
MIB = 1 << 20
WIDTH = 96


async def rows(client: EncoderClient, items: list[MediaItem]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    async for event in client.encode(items, "r"):
        if isinstance(event, RowsEvent):
            found[event.item_index] = torch.empty(event.rows.num_tokens, WIDTH)
            event.rows.copy_to(found[event.item_index], None, 0)
            event.rows.release()
    return [found[index] for index in sorted(found)]


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[grpc.aio.Channel]:
    """Has clients send all requests in pieces; returns the channels that they did so on."""
    used: list[grpc.aio.Channel] = []

    def method(channel: grpc.aio.Channel) -> Any:
        used.append(channel)
        return encode_in_pieces_method(channel)

    monkeypatch.setattr(encoder_client, "_LARGE_REQUEST_NBYTES", 0)
    monkeypatch.setattr(request_pieces, "MAX_PIECE_NBYTES", 1000)
    monkeypatch.setattr(encoder_client, "encode_in_pieces_method", method)
    return used


@pytest.mark.parametrize("minor", [3, 4])
async def test_rows_are_those_of_a_whole_request(
    qwen3_vl_folder: Path,
    tmp_path: Path,
    in_pieces: list[grpc.aio.Channel],
    monkeypatch: pytest.MonkeyPatch,
    minor: int,
) -> None:
    monkeypatch.setattr(codec, "PROTOCOL_MINOR_VERSION", minor)  # of the encoder
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        client = EncoderClient([encoder.address], encoder.identity, transport="grpc", shm_folder=tmp_path)
        await client.start()
        found = await rows(client, [image(each) for each in PICTURES])
        await client.close()
        for rows_TD, picture in zip(found, PICTURES, strict=True):
            torch.testing.assert_close(rows_TD, encoder.rows_of(picture)[:, :WIDTH])
        assert len(in_pieces) == (minor == 4)
        assert encoder.held.reserved_nbytes == 0


async def test_small_requests_go_as_one_message(
    qwen3_vl_folder: Path, tmp_path: Path, in_pieces: list[grpc.aio.Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_client, "_LARGE_REQUEST_NBYTES", len(PICTURES[0]))
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        client = EncoderClient([encoder.address], encoder.identity, transport="grpc", shm_folder=tmp_path)
        await client.start()
        await rows(client, [image(PICTURES[0])])
        assert not in_pieces
        await rows(client, [image(PICTURES[0] + b"a")])
        assert len(in_pieces) == 1
        await client.close()


async def refused(encoder: RunningEncoder, messages: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in encode_in_pieces_method(encoder.channel)(messages):
            pass
    error = error_from_rpc(caught.value)
    assert error is not None, caught.value
    return error


def announcing(nbytes: int, num_items: int = 1) -> bytes:
    item = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data_nbytes=nbytes)
    return encoder_pb2.EncodeRequest(items=[item] * num_items).SerializeToString()


def piece(nbytes: int) -> bytes:
    return encoder_pb2.EncodeRequest(piece=bytes(nbytes)).SerializeToString()


async def nothing_held(encoder: RunningEncoder) -> None:
    while encoder.held.reserved_nbytes or encoder.calls.count:  # calls end a moment after their clients know
        await asyncio.sleep(0.01)


async def test_the_client_sees_why_it_was_refused_while_it_writes(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        for _ in range(5):  # which of the two it sees would be a matter of luck
            announced = await refused(encoder, iter([announcing(1 << 40), *[piece(MIB)] * 8]))
            assert isinstance(announced, BadRequest) and "are announced" in str(announced)
            short = await refused(encoder, iter([announcing(8 * MIB), piece(1000), *[piece(MIB)] * 8]))
            assert isinstance(short, BadRequest) and "a piece of 1000 bytes, where one of 1048576" in str(short)
            large = await refused(encoder, iter([announcing(8 * MIB), piece(2 * MIB), *[piece(MIB)] * 8]))
            assert isinstance(large, BadRequest) and "a stream takes up to 1114112" in str(large)
            number = await refused(encoder, iter([announcing(MIB, 1000), *[piece(MIB)] * 8]))
            assert isinstance(number, TooManyItems)
            with encoder.held.item() as kept:
                kept.reserve(encoder.held.left_nbytes - 2 * MIB)
                over = await refused(encoder, iter([announcing(8 * MIB), *[piece(MIB)] * 8]))
                assert isinstance(over, Overloaded) and "1048580 more would pass" in str(over)
        await nothing_held(encoder)


async def test_pieces_count_as_they_arrive(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        call = encode_in_pieces_method(encoder.channel)()
        first = announcing(2 * MIB + 100)
        sent = [first, piece(MIB), piece(MIB), piece(100)]
        for index, message in enumerate(sent):
            await call.write(message)
            while encoder.held.reserved_nbytes < sum(map(len, sent[: index + 1])):
                await asyncio.sleep(0.01)
        assert encoder.held.reserved_nbytes == sum(map(len, sent))
        assert encoder.calls.count == 1
        call.cancel()
        await nothing_held(encoder)


@pytest.mark.parametrize("last", [piece(1000), piece(MIB)], ids=["a wrong piece", "no room for it"])
async def test_nothing_is_kept_of_a_refused_request(qwen3_vl_folder: Path, tmp_path: Path, last: bytes) -> None:
    """Also while the client could still send more."""
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        one = piece(MIB)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        with encoder.held.item() as kept:
            kept.reserve(encoder.held.left_nbytes * 7 // 8 - 6 * MIB - MIB // 2)  # seven eighths are for large requests
            call = encode_in_pieces_method(encoder.channel)()
            for message in [announcing(8 * MIB), *[one] * 6]:
                await call.write(message)
            while encoder.held.reserved_nbytes < kept.nbytes + 6 * MIB:
                await asyncio.sleep(0.01)
            await call.write(last)
            while encoder.held.reserved_nbytes > kept.nbytes:
                await asyncio.sleep(0.01)
        while tracemalloc.get_traced_memory()[0] > before + MIB + MIB // 2:  # with `one`
            assert not call.done(), "what was read is kept until the call ends"
            await asyncio.sleep(0.01)
        tracemalloc.stop()
        call.cancel()
        await nothing_held(encoder)


async def test_a_sender_that_stops_or_is_slow_ends(
    qwen3_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, client_timeout_s=0.5) as encoder:
        call = encode_in_pieces_method(encoder.channel)()
        await call.write(announcing(8 * MIB))
        await call.write(piece(MIB))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "did not arrive within 0.5 s" in await call.details()
        await nothing_held(encoder)
        # Each piece comes in time, and all of them together do not.
        monkeypatch.setattr(pieces_context, "LEAST_BYTES_PER_S", math.inf)
        call = encode_in_pieces_method(encoder.channel)()
        await call.write(announcing(8 * MIB))
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for _ in range(8):
                await asyncio.sleep(0.2)
                await call.write(piece(MIB))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "came too slowly" in await call.details()
        await nothing_held(encoder)


async def test_what_a_refused_client_goes_on_sending_is_read_for_a_time(
    qwen3_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within bounds of time and of bytes: the call ends although the client would go on."""
    async with run_encoder(qwen3_vl_folder, tmp_path, client_timeout_s=0.5) as encoder:
        call = encode_in_pieces_method(encoder.channel)()
        await call.write(announcing(1 << 40))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = encode_in_pieces_method(encoder.channel)()
        await call.write(announcing(1 << 40))
        written = 0
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(piece(8 * MIB))
                written += 1
        assert written < 64
        await nothing_held(encoder)


async def test_a_call_in_pieces_is_tried_at_another_encoder(
    qwen3_vl_folder: Path, tmp_path: Path, in_pieces: list[grpc.aio.Channel]
) -> None:
    async with (
        run_encoder(qwen3_vl_folder, tmp_path) as first,
        run_encoder(qwen3_vl_folder, tmp_path) as second,
    ):
        encoders = [first, second]
        client = EncoderClient(
            [each.address for each in encoders], first.identity, transport="grpc", shm_folder=tmp_path
        )
        await client.start()
        for full in encoders:
            with full.held.item() as kept:
                kept.reserve(full.held.left_nbytes)
                (found,) = await rows(client, [image(PICTURES[0])])
            torch.testing.assert_close(found, first.rows_of(PICTURES[0])[:, :WIDTH])
        assert client.stats().retries == 1  # the picture's encoder was full once
        assert len(in_pieces) == 3
        await client.close()
        for each in encoders:
            await nothing_held(each)


async def test_a_cancelled_client_leaves_nothing(
    qwen3_vl_folder: Path, tmp_path: Path, in_pieces: list[grpc.aio.Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        client = EncoderClient([encoder.address], encoder.identity, transport="grpc", shm_folder=tmp_path)
        await client.start()
        await rows(client, [image(PICTURES[1])])
        before = len(asyncio.all_tasks())
        stops = asyncio.Event()

        async def stopping(first: bytes, items: Iterable[MediaItem]) -> AsyncIterator[bytes]:
            yield first
            stops.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(encoder_client, "in_pieces", stopping)
        encoding = asyncio.create_task(rows(client, [image(PICTURES[0])]))
        await stops.wait()
        while not encoder.calls.count:
            await asyncio.sleep(0.01)
        encoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await encoding
        await nothing_held(encoder)
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)
        await client.close()
