"""The gRPC servicer over a loopback: Describe, Encode over bytes and shared memory, health, reflection, refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.encoder_service.models.reference import reference_from_folder, reference_rows
from tests.encoder_service.running import MAX_ITEMS, RunningEncoder, image, image_message, png, run_encoder
from tests.integration.media_server import serve_media
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.row_peer import TransportChoice
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.server import EncoderServer, EncoderServicer
from vitrine_vlm.errors import EncoderUnavailable, Overloaded
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.types import EmbeddingRows, LayoutEvent, MediaItem

Session: TypeAlias = grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path) as running:
        yield running


def stub(encoder: RunningEncoder) -> encoder_pb2_grpc.EncoderAsyncStub:
    return encoder_pb2_grpc.EncoderStub(encoder.channel)


async def encode(encoder: RunningEncoder, request: encoder_pb2.EncodeRequest) -> list[encoder_pb2.EncodeResponse]:
    return [response async for response in stub(encoder).Encode(request)]


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never held")


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, str]:
    """The status, the error code and the message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    metadata = dict(failure.value.trailing_metadata() or ())
    return failure.value.code(), str(metadata.get(ERROR_CODE_KEY)), failure.value.details() or ""


async def test_describe_names_model_rows_and_settings(encoder: RunningEncoder) -> None:
    description = await stub(encoder).Describe(encoder_pb2.DescribeRequest())
    assert description.model == encoder.identity.model
    assert description.revision == encoder.identity.revision
    assert description.model_type == "qwen3_vl"
    assert description.out_hidden_size == 96
    assert list(description.deepstack_visual_indexes) == [1, 2, 3]
    assert description.dtype == "float32"
    assert list(description.transports) == ["shm", "grpc"]
    assert description.max_items == MAX_ITEMS
    assert description.processor.patch_size == 16
    assert description.processor.max_pixels == encoder.preprocessor.settings.max_pixels
    assert list(description.processor.image_mean) == [0.5, 0.5, 0.5]
    assert (description.protocol_version, description.protocol_minor_version) == (1, 5)
    assert (len(description.instance_id), description.ticket_ttl_s) == (32, 30.0)
    assert list(description.patch_dtypes) == ["uint8", "float32", "bfloat16", "float16"]


async def test_rows_as_bytes_equal_transformers(checkpoint_folder: Path, tmp_path: Path) -> None:
    # Sides are multiples of both families' tokens, so that nothing is resized.
    pictures = [png(448, 224, 1), png(224, 224, 2)]
    reference = reference_from_folder(checkpoint_folder)
    async with run_encoder(checkpoint_folder, tmp_path) as encoder:
        request = encoder_pb2.EncodeRequest(items=[image_message(picture) for picture in pictures])
        responses = await encode(encoder, request)
        preprocessor = encoder.preprocessor
    for index, picture in enumerate(pictures):
        (layout,) = (r.layout for r in responses if r.WhichOneof("event") == "layout" and r.layout.item_index == index)
        chunks = [r.chunk for r in responses if r.WhichOneof("event") == "chunk" and r.chunk.item_index == index]
        patches = preprocessor.open("image", picture).patches()
        t, h, w = layout.grid_thw
        expected = reference_rows(reference, patches, [(t, h, w)])
        got = torch.frombuffer(bytearray(b"".join(chunk.data for chunk in chunks)), dtype=torch.float32)
        assert (got.view(layout.num_tokens, -1) - expected).abs().max() <= 1e-4
        assert chunks[-1].timings.forward_ms > 0
        assert len(layout.content_hash) == 32


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_the_client_gets_the_same_rows_over_either_transport(
    encoder: RunningEncoder, tmp_path: Path, transport: TransportChoice
) -> None:
    pictures = [png(96, 64, 1), png(512, 512, 2)]
    client = EncoderClient([encoder.address], encoder.identity, transport=transport, shm_folder=tmp_path)
    await client.start()
    await client.wait_ready(10)
    rows: dict[int, EmbeddingRows] = {}
    async for event in client.encode([image(picture) for picture in pictures], "r1"):
        if not isinstance(event, LayoutEvent):
            rows[event.item_index] = event.rows
    for index, picture in enumerate(pictures):
        expected = encoder.rows_of(picture)
        main, deepstack = torch.empty(len(expected), 96), torch.empty(3, len(expected), 96)
        rows[index].copy_to(main, deepstack, 0)
        assert (torch.cat([main, *deepstack], dim=1) - expected).abs().max() < 1e-4
        assert rows[index].timings.forward_ms > 0
        rows[index].release()
    await eventually(lambda: encoder.exporter.stats().live_leases == 0)
    await client.close()
    assert encoder.exporter.stats().shipped_nbytes[transport] > 0


async def test_a_bad_item_is_reported_and_the_others_answer(encoder: RunningEncoder) -> None:
    items = [image_message(b"no picture"), image_message(png(64, 64))]
    responses = await encode(encoder, encoder_pb2.EncodeRequest(items=items))
    (failed,) = (r.failed for r in responses if r.WhichOneof("event") == "failed")
    assert (failed.item_index, failed.code) == (0, "not_an_image")
    assert {r.chunk.item_index for r in responses if r.WhichOneof("event") == "chunk"} == {1}


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (encoder_pb2.EncodeRequest(), "invalid_request", "no media items"),
        (encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem(data=b"x")]), "invalid_request", "item 0 has kind 0"),
        (
            encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_VIDEO)]),
            "invalid_request",
            "item 0 has no source",
        ),
        (encoder_pb2.EncodeRequest(items=[image_message(b"x")] * 9), "too_many_items", "9 media items: at most 8"),
        (
            encoder_pb2.EncodeRequest(items=[image_message(b"x")], tenant="t" * 1025),
            "invalid_request",
            "tenant has 1025 characters: at most 1024",
        ),
        (
            encoder_pb2.EncodeRequest(items=[image_message(b"x")], session_id="s" * 2_000_000),
            "invalid_request",
            "session_id has 2000000 characters: at most 1024",
        ),
        (
            encoder_pb2.EncodeRequest(
                items=[
                    encoder_pb2.MediaItem(
                        kind=encoder_pb2.MEDIA_KIND_VIDEO,
                        patches=encoder_pb2.Patches(
                            data=bytes(4096), grid_thw=[2**31, 2, 2], timestamps_s=[0.0] * 1_000_000
                        ),
                    )
                ]
            ),
            "invalid_request",
            "item 0 has 1000000 timestamps and 4096 bytes of patches",
        ),
    ],
)
async def test_malformed_requests_are_refused(
    encoder: RunningEncoder, request_: encoder_pb2.EncodeRequest, code: str, message: str
) -> None:
    status, got_code, details = await refused(encode(encoder, request_))
    assert (status, got_code) == (grpc.StatusCode.INVALID_ARGUMENT, code)
    assert message in details


async def test_an_unknown_session_fails_its_item(encoder: RunningEncoder) -> None:
    request = encoder_pb2.EncodeRequest(session_id="gone", items=[image_message(png(64, 64))])
    responses = await encode(encoder, request)
    assert [r.failed.code for r in responses if r.WhichOneof("event") == "failed"] == ["encoder_unavailable"]


async def test_until_the_model_is_loaded_everything_is_unavailable(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, loaded=False) as encoder:
        for service in ("", "vitrine.encoder.v1.Encoder"):
            assert await health_of(encoder.channel, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        calls: list[Awaitable[object]] = [
            stub(encoder).Describe(encoder_pb2.DescribeRequest()),
            encode(encoder, encoder_pb2.EncodeRequest(items=[image_message(b"x")])),
            stub(encoder).Release(encoder_pb2.ReleaseRequest()),
        ]
        for call in calls:
            status, code, details = await refused(call)
            assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "encoder_unavailable")
            assert "still loading" in details


async def test_health_and_reflection(encoder: RunningEncoder) -> None:
    for service in ("", "vitrine.encoder.v1.Encoder"):
        assert await health_of(encoder.channel, service) == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(encoder.channel).ServerReflectionInfo(iter([request]))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {"vitrine.encoder.v1.Encoder", "grpc.health.v1.Health"} <= names


async def test_draining_refuses_new_requests_and_finishes_running_ones(encoder: RunningEncoder) -> None:
    encoder.tower.gate.clear()
    request = encoder_pb2.EncodeRequest(items=[image_message(png(64, 64))])
    running = asyncio.create_task(encode(encoder, request))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    await encoder.server.set_not_serving_for_good()
    encoder.calls.refuse(lambda: EncoderUnavailable("the encoder is shutting down"))
    assert await health_of(encoder.channel, "") == health_pb2.HealthCheckResponse.NOT_SERVING
    status, code, _ = await refused(encode(encoder, request))
    assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "encoder_unavailable")
    idle = asyncio.create_task(encoder.calls.idle(10))
    await asyncio.sleep(0.05)
    assert not idle.done()
    encoder.tower.gate.set()
    await asyncio.wait_for(idle, 10)
    assert {r.WhichOneof("event") for r in await running} == {"layout", "chunk"}


async def connect(encoder: RunningEncoder) -> tuple[str, Session]:
    """Opens a session that accepts leases, without reading any memory."""
    call = stub(encoder).Connect()
    await call.write(encoder_pb2.ConnectRequest(hello=encoder_pb2.Hello(protocol_version=1, transports=["shm"])))
    offer = await call.read()
    assert isinstance(offer, encoder_pb2.ConnectResponse) and offer.WhichOneof("message") == "offer"
    result = encoder_pb2.ProbeResult(nonce=encoder.exporter._pools[0].nonce)
    await call.write(encoder_pb2.ConnectRequest(probe_result=result))
    response = await call.read()
    assert isinstance(response, encoder_pb2.ConnectResponse)
    return response.session.session_id, call


async def reads_layout(call: grpc.aio.UnaryStreamCall[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse]) -> bool:
    """Whether the next response is a layout."""
    response = await call.read()
    return isinstance(response, encoder_pb2.EncodeResponse) and response.WhichOneof("event") == "layout"


async def test_a_client_that_disconnects_stops_its_request_and_releases_leases(encoder: RunningEncoder) -> None:
    session_id, session = await connect(encoder)
    async with serve_media() as server:
        slow = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, url=server.url("/hangs"))
        request = encoder_pb2.EncodeRequest(session_id=session_id, items=[slow, image_message(png(64, 64))])
        call = stub(encoder).Encode(request)
        assert await reads_layout(call)
        await eventually(lambda: encoder.exporter.stats().live_leases == 1)
        await server.num_waiting.acquire()
        call.cancel()
        assert await encoder.calls.idle(10)
    requests = "vitrine_encoder_requests_total"
    await eventually(lambda: encoder.metrics.registry.get_sample_value(requests, {"outcome": "cancelled"}) == 1)
    assert encoder.admission.num_patches == 0
    # Its Ready was written, but the leases of a cancelled request are released; the session goes on.
    assert encoder.exporter.stats().live_leases == 0
    assert encoder.exporter.stats().sessions == 1
    session.cancel()


async def test_a_request_cancelled_during_the_forward_leaves_nothing_in_the_pool(encoder: RunningEncoder) -> None:
    session_id, session = await connect(encoder)
    encoder.tower.gate.clear()
    request = encoder_pb2.EncodeRequest(session_id=session_id, items=[image_message(png(64, 64))])
    call = stub(encoder).Encode(request)
    assert await reads_layout(call)
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    call.cancel()
    assert await encoder.calls.idle(10)
    encoder.tower.gate.set()
    responses = await encode(encoder, request)  # behind the cancelled one
    assert [response.WhichOneof("event") for response in responses] == ["layout", "ready"]
    assert sum(encoder.exporter.stats().pool_used_nbytes.values()) == 64 + responses[1].ready.lease.nbytes
    session.cancel()


async def test_metrics_count_what_happened(encoder: RunningEncoder) -> None:
    await encode(encoder, encoder_pb2.EncodeRequest(items=[image_message(png(64, 64)), image_message(b"x")]))
    value = encoder.metrics.registry.get_sample_value
    await eventually(lambda: value("vitrine_encoder_requests_total", {"outcome": "ok"}) == 1)
    assert value("vitrine_encoder_items_total", {"kind": "image", "outcome": "ok"}) == 1
    assert value("vitrine_encoder_items_total", {"kind": "image", "outcome": "not_an_image"}) == 1
    assert value("vitrine_encoder_batch_patches_sum") == 16
    assert value("vitrine_encoder_stage_seconds_count", {"stage": "forward"}) == 1
    assert value("vitrine_encoder_stage_seconds_count", {"stage": "load"}) == 2
    assert value("vitrine_encoder_shipped_bytes_total", {"transport": "grpc"}) == 4 * 96 * 4 * 4
    assert value("vitrine_encoder_leases_live") == 0
    assert value("vitrine_encoder_queue_patches") == 0
    assert value("vitrine_encoder_admitted_patches") == 0


async def test_a_port_in_use_is_refused(encoder: RunningEncoder) -> None:
    second = EncoderServer(EncoderServicer(EncoderMetrics(), RunningCalls(), ByteBudget(1)))
    with pytest.raises(OSError, match="cannot listen on"):
        await second.start("127.0.0.1", int(encoder.address.rsplit(":", 1)[1]))


async def test_overload_reaches_the_client_as_overload(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path, max_queued_patches=20) as encoder:
        encoder.tower.gate.clear()
        client = EncoderClient([encoder.address], encoder.identity, shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(10)

        async def ask(item: MediaItem) -> None:
            async for event in client.encode([item], "r"):
                if not isinstance(event, LayoutEvent):
                    event.rows.release()

        first = asyncio.create_task(ask(image(png(64, 64))))
        assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
        with pytest.raises(Overloaded, match="16 patches are queued and 16 more"):
            await ask(image(png(64, 64, 2)))
        encoder.tower.gate.set()
        await first
        await client.close()


async def test_a_call_that_ends_too_soon_for_what_is_queued_is_refused(encoder: RunningEncoder) -> None:
    encoder.admission._cost.per_patch_s = 0.5
    stub = encoder_pb2_grpc.EncoderStub(encoder.channel)
    request = encoder_pb2.EncodeRequest(items=[image_message(png(64, 64))])  # 16 patches
    with encoder.admission.admit((1, 4, 4)):
        responses = [response async for response in stub.Encode(request, timeout=12)]
        assert [response.failed.code for response in responses] == ["overloaded"]
        assert "8 s of work are queued" in responses[0].failed.message
        responses = [response async for response in stub.Encode(request, timeout=30)]
        assert "overloaded" not in [response.failed.code for response in responses]


class StuckContext:
    """A call whose peer reads the layout and then nothing more."""

    def __init__(self) -> None:
        self.stuck = asyncio.Event()

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> None:
        return None

    async def write(self, message: encoder_pb2.EncodeResponse | bytes) -> None:
        if isinstance(message, encoder_pb2.EncodeResponse) and message.WhichOneof("event") == "ready":
            self.stuck.set()
            await asyncio.Event().wait()


async def test_a_call_whose_client_is_lost_while_it_is_written_to_logs_no_traceback(
    encoder: RunningEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    # A client that takes less than these rows before it reads.
    options = [*CHANNEL_OPTIONS, ("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0)]
    for num_items in (1, 2):
        async with grpc.aio.insecure_channel(encoder.address, options=options) as channel:
            items = [image_message(png(512, 512, seed)) for seed in range(num_items)]
            call = encoder_pb2_grpc.EncoderStub(channel).Encode(encoder_pb2.EncodeRequest(items=items))
            assert await reads_layout(call)
            await eventually(lambda: len(encoder.tower.batches) > 0)
            assert not await encoder.calls.idle(0.3)
        assert await encoder.calls.idle(10)
        encoder.tower.batches.clear()
    await asyncio.sleep(0.05)  # gRPC ends its task behind ours
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_leases_that_never_reached_the_client_are_released(encoder: RunningEncoder) -> None:
    session_id, session = await connect(encoder)
    request = encoder_pb2.EncodeRequest(session_id=session_id, items=[image_message(png(64, 64))])
    context = StuckContext()
    call = asyncio.create_task(encoder.servicer.Encode(request, context))  # type: ignore[arg-type]
    await asyncio.wait_for(context.stuck.wait(), 10)
    assert encoder.exporter.stats().live_leases == 1
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert encoder.exporter.stats().live_leases == 0
    assert encoder.exporter.stats().leases.released == 1
    session.cancel()
