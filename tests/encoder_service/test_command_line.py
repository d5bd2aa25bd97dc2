"""`vitrine-encoder` as a process: it starts, logs what it does, answers, and stops on SIGTERM."""

from __future__ import annotations

import asyncio
import io
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from transformers import AutoImageProcessor

from tests.encoder_service.models.reference import reference_from_folder, reference_rows
from tests.encoder_service.running import image, image_message, png
from tests.integration.fleet import ServiceProcess
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import RowsEvent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def wait_serving(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = await health.Check(health_pb2.HealthCheckRequest(service="vitrine.encoder.v1.Encoder"))
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the encoder never became SERVING")


async def test_the_process_encodes_a_picture_as_transformers_does(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    metrics_port = free_port()
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--shm-folder", str(tmp_path), "--pool-bytes", "4194304"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags, "--metrics-port", str(metrics_port), fork=False)
    try:
        address = (await asyncio.to_thread(encoder.wait_listening))["grpc"]
        async with grpc.aio.insecure_channel(address) as channel:
            await wait_serving(channel)
            stub = encoder_pb2_grpc.EncoderStub(channel)
            description = await stub.Describe(encoder_pb2.DescribeRequest())
            assert (description.model, description.dtype) == (qwen3_vl_folder.name, "float32")

            picture = png(192, 128)
            request = encoder_pb2.EncodeRequest(request_id="r", items=[image_message(picture)])
            responses = [response async for response in stub.Encode(request)]
        metrics = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5).read().decode()
        )
        assert list(tmp_path.iterdir()), "no pool was made"
    finally:
        status = await asyncio.to_thread(encoder.stop)
    log = "\n".join(encoder.lines)
    assert status == 0, log
    assert "loading visual weights" in log
    assert "SERVING" in log
    assert not list(tmp_path.iterdir()), "the pool was left behind"
    assert 'vitrine_encoder_requests_total{outcome="ok"} 1.0' in metrics

    processor = AutoImageProcessor.from_pretrained(qwen3_vl_folder)
    processed = processor(images=[Image.open(io.BytesIO(picture))], return_tensors="pt")
    layout = next(r.layout for r in responses if r.WhichOneof("event") == "layout")
    assert list(layout.grid_thw) == processed["image_grid_thw"][0].tolist()
    data = b"".join(r.chunk.data for r in responses if r.WhichOneof("event") == "chunk")
    rows = torch.frombuffer(bytearray(data), dtype=torch.float32).view(layout.num_tokens, -1)
    t, h, w = layout.grid_thw
    expected = reference_rows(reference_from_folder(qwen3_vl_folder), processed["pixel_values"], [(t, h, w)])
    assert (rows - expected).abs().max() <= 1e-4


async def test_a_stopping_process_waits_for_its_leases(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--shm-folder", str(tmp_path), "--pool-bytes", "4194304"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags, fork=False)
    try:
        address = (await asyncio.to_thread(encoder.wait_listening))["grpc"]
        client = EncoderClient([address], None, transport="shm", shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(60)
        events = [event async for event in client.encode([image(png(64, 64))], "r")]
        (rows,) = (event.rows for event in events if isinstance(event, RowsEvent))
        stopping = asyncio.create_task(asyncio.to_thread(encoder.stop))
        for _ in range(500):
            if not client.ready:
                break
            await asyncio.sleep(0.01)
        assert not client.ready, "the client did not learn that the encoder drains"
        assert not stopping.done()
        main, deepstack = torch.empty(4, 96), torch.empty(3, 4, 96)
        rows.copy_to(main, deepstack, 0)
        rows.release()
        started = time.monotonic()
        assert await stopping == 0, "\n".join(encoder.lines)
        assert time.monotonic() - started < 10, "it waited for its whole drain timeout"
        await client.close()
    finally:
        await asyncio.to_thread(encoder.stop)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--model", "/nonexistent"], 1, "has no config.json"),
        (["--model", "{folder}", "--allowed-media-folder", "/nonexistent"], 1, "is not a folder"),
        (["--model", "{folder}", "--quantization", "fp8", "--device", "cpu"], 1, "needs bfloat16 on a GPU"),
        (["--model", "{folder}", "--pool-bytes", str(1 << 60), "--shm-folder", "{tmp}"], 1, "cannot start: no pool"),
    ],
)
def test_what_cannot_start_says_why(
    qwen3_vl_folder: Path, tmp_path: Path, flags: list[str], status: int, message: str
) -> None:
    filled = [flag.format(folder=qwen3_vl_folder, tmp=tmp_path) for flag in flags]
    finished = subprocess.run(
        [sys.executable, "-m", "vitrine_vlm.encoder_service", "--port", "0", *filled],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == status, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


async def test_a_stopping_process_does_not_wait_for_tickets(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--shm-folder", str(tmp_path), "--pool-bytes", "4194304"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags, "--ticket-ttl-s", "77", fork=False)
    try:
        address = (await asyncio.to_thread(encoder.wait_serving))["grpc"]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = encoder_pb2_grpc.EncoderStub(channel)
            assert (await stub.Describe(encoder_pb2.DescribeRequest())).ticket_ttl_s == 77
            request = encoder_pb2.EncodeRequest(items=[image_message(png(64, 64))], layout_only=True)
            (response,) = [response async for response in stub.Encode(request)]
            assert len(response.layout.ticket) == 16
            assert (await stub.GetStats(encoder_pb2.GetStatsRequest())).num_live_tickets == 1
        started = time.monotonic()
    finally:
        status = await asyncio.to_thread(encoder.stop)
    assert (status, time.monotonic() - started < 10) == (0, True), "\n".join(encoder.lines)
