"""A Ready that its client does not read, as it crosses the end of the call there: the lease ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.embedding_transport.clients.unread import read_up_to
from tests.encoder_service.running import RunningEncoder, image, image_message, png, run_encoder
from vitrine_vlm.embedding_transport.clients import encoder_client
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import RowsEvent

# Longer than any of these tests.
LEASE_TTL_S = 60.0


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path, lease_ttl_s=LEASE_TTL_S) as running:
        yield running


@asynccontextmanager
async def client_of(
    encoder: RunningEncoder, folder: Path, encode_timeout_s: float = 60.0
) -> AsyncIterator[EncoderClient]:
    client = EncoderClient(
        [encoder.address], encoder.identity, transport="shm", shm_folder=folder, encode_timeout_s=encode_timeout_s
    )
    await client.start()
    await client.wait_ready(10)
    yield client
    await client.close()


def is_kind(kind: str) -> Callable[[bytes], bool]:
    return lambda raw: encoder_pb2.EncodeResponse.FromString(raw).WhichOneof("event") == kind


async def until_leases(encoder: RunningEncoder, number: int) -> None:
    async with asyncio.timeout(10):
        while encoder.exporter.stats().live_leases != number:
            await asyncio.sleep(0.005)


async def test_a_lease_whose_ready_crosses_the_cancellation_ends_at_once(
    encoder: RunningEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_up_to(is_kind("layout"), monkeypatch, encoder_client, "encode_method")
    async with client_of(encoder, tmp_path) as client:
        for seed in range(3):
            events = client.encode([image(png(64, 64, seed))], "the same request id")
            await anext(events)
            assert await encoder.calls.idle(10)
            assert encoder.exporter.stats().live_leases == 1, "the encoder has ended the call, and cannot know"
            await events.aclose()
            await until_leases(encoder, 0)
        counts = encoder.exporter.stats().leases
        assert (counts.released, counts.expired, counts.unknown) == (3, 0, 0)
        assert sum(encoder.exporter.stats().pool_used_nbytes.values()) == 0
        assert [peer.num_leases for peer in client._peers.values()] == [0]


async def test_leases_that_were_read_outlive_the_call(
    encoder: RunningEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_up_to(is_kind("ready"), monkeypatch, encoder_client, "encode_method")
    async with client_of(encoder, tmp_path) as client:
        events = client.encode([image(png(64, 64, seed)) for seed in range(3)], "r")
        while not isinstance(event := await anext(events), RowsEvent):
            pass
        assert await encoder.calls.idle(10)
        await until_leases(encoder, 3)
        await events.aclose()
        await until_leases(encoder, 1)
        event.rows.check()
        event.rows.release()
        await until_leases(encoder, 0)
        assert encoder.exporter.stats().leases.released == 3


async def test_a_lease_whose_ready_crosses_the_deadline_ends_at_once(
    encoder: RunningEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_up_to(is_kind("layout"), monkeypatch, encoder_client, "encode_method")
    async with client_of(encoder, tmp_path, encode_timeout_s=1.0) as client:
        events = client.encode([image(png(64, 64))], "r")
        await anext(events)
        assert await encoder.calls.idle(10)
        assert encoder.exporter.stats().live_leases == 1
        with pytest.raises(EncoderUnavailable, match="DEADLINE_EXCEEDED"):
            await anext(events)
        await until_leases(encoder, 0)


async def test_a_release_of_calls_ends_leases_of_these_calls_alone(encoder: RunningEncoder, tmp_path: Path) -> None:
    stub = encoder_pb2_grpc.EncoderStub(encoder.channel)

    async def lease(session_id: str, call_id: int) -> int:
        request = encoder_pb2.EncodeRequest(session_id=session_id, items=[image_message(png(64, 64))], call_id=call_id)
        (found,) = [each.ready.lease.lease_id async for each in stub.Encode(request) if each.HasField("ready")]
        return found

    async def release(session_id: str, **call: object) -> int:
        calls = [encoder_pb2.UnreadCall(**call)]  # type: ignore[arg-type]
        answer = await stub.Release(encoder_pb2.ReleaseRequest(session_id=session_id, unread_calls=calls))
        return answer.num_released

    async with client_of(encoder, tmp_path) as one, client_of(encoder, tmp_path) as other:
        peers = [peer for client in (one, other) for peer in client._peers.values()]
        sessions = [peer.connection.session_id for peer in peers if peer.connection]
        await lease(sessions[0], 0)  # of a client from before call ids
        read = await lease(sessions[0], 7)
        await lease(sessions[0], 7)
        await lease(sessions[0], 8)
        await lease(sessions[1], 7)
        assert await release(sessions[0], call_id=0) == 0
        assert await release(sessions[0], call_id=6) == 0
        assert await release("another", call_id=7) == 0
        assert await release(sessions[0], call_id=7, read_lease_ids=[read]) == 1
        assert await release(sessions[0], call_id=7) == 1
        assert encoder.exporter.stats().live_leases == 3
