"""One deadline for everything that a service still does when it gets SIGTERM."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from tests.integration.fleet import ServiceProcess
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY, RETRY_KEY
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.types import PROTOCOL_VERSION

DRAIN_TIMEOUT_S = 1.0
# The process ends one second after the deadline at the latest; the rest is for a busy machine to notice it.
LATEST_S = DRAIN_TIMEOUT_S + 1.0 + 1.0


@pytest.fixture
def services(qwen3_vl_folder: Path) -> Iterator[list[ServiceProcess]]:
    started: list[ServiceProcess] = []
    yield started
    for process in started:
        process.stop()


async def ended(process: ServiceProcess, since: float) -> int:
    status = await asyncio.to_thread(process.process.wait, 20)
    assert time.monotonic() - since < LATEST_S, process.lines
    return status


async def answered_until_the_end(
    process: ServiceProcess, address: str, call: Callable[[grpc.aio.Channel], Awaitable[object]]
) -> None:
    """Calls an ending service over one new connection after the other: each call is refused in words until it stops.

    gRPC itself cancels a call that comes while the port closes, without words. What the system takes to end the process
    is not counted: that is longer than all that the service does then.
    """
    began = last_in_words = time.monotonic()
    while not any(line.endswith("stopped") for line in process.lines):
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if "to another one" in (caught.value.details() or ""):
            assert dict(caught.value.trailing_metadata() or ())[RETRY_KEY] == "1000"
            last_in_words = time.monotonic()
        await asyncio.sleep(0.01)
    assert last_in_words > began
    assert time.monotonic() - last_in_words < 0.2 * (time.monotonic() - began)


async def test_a_worker_cuts_its_requests_off_with_errors_that_can_be_tried_again(
    qwen3_vl_folder: Path, services: list[ServiceProcess]
) -> None:
    flags = ["--model", str(qwen3_vl_folder), "--encoders", "127.0.0.1:9", "--port", "0", "--grpc-port", "0"]
    worker = ServiceProcess("vitrine_vlm.llm_worker", *flags, "--drain-timeout-s", str(DRAIN_TIMEOUT_S))
    services.append(worker)
    addresses = await asyncio.to_thread(worker.wait_serving)
    url = f"http://{addresses['http']}"
    body = {"model": qwen3_vl_folder.name, "prompt": "Hello", "max_tokens": 20_000, "ignore_eos": True}
    sampling = llm_pb2.SamplingParams(max_tokens=20_000, ignore_eos=True)
    async with aiohttp.ClientSession() as session, grpc.aio.insecure_channel(addresses["grpc"]) as channel:
        call = llm_pb2_grpc.LlmStub(channel).Generate(
            llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling)
        )
        assert await call.read() and await call.read()
        whole = asyncio.create_task(session.post(f"{url}/v1/completions", json=body).__aenter__())
        async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            await stream.content.readuntil(b"\n\n")
            reader, writer = await asyncio.open_connection(*addresses["http"].rsplit(":", 1))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99"
            writer.write(head + b"\r\n\r\nhalf a body")
            worker.process.send_signal(signal.SIGTERM)
            since = time.monotonic()
            await asyncio.sleep(0.2)
            hello = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"))

            async def generate(new: grpc.aio.Channel) -> object:
                return await llm_pb2_grpc.LlmStub(new).Generate(hello).read()

            answered = asyncio.create_task(answered_until_the_end(worker, addresses["grpc"], generate))
            async with session.get(f"{url}/ready") as response:
                assert (response.status, (await response.json())["reason"]) == (503, "shutting down")
            async with aiohttp.ClientSession() as another, another.post(f"{url}/v1/completions", json=body) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "worker_unavailable")
                assert response.headers["Retry-After"] == "1", "another worker may take the request at once"
                assert response.headers["Connection"] == "close", "the next try would come to this worker again"
            events = (await stream.content.read()).decode().strip().split("\n\n")
        assert DRAIN_TIMEOUT_S - 0.1 < time.monotonic() - since < DRAIN_TIMEOUT_S + 0.5
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "worker_unavailable"
        half_sent = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.close()
        assert " 503 " in half_sent and "Retry-After: 1\r\n" in half_sent
        answer = await whole
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "worker_unavailable")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "within 1 s" in (caught.value.details() or "")
        await answered
        await ended(worker, since)


async def test_a_worker_that_still_waits_for_its_encoders_drains_like_any_other(
    qwen3_vl_folder: Path, services: list[ServiceProcess], tmp_path: Path
) -> None:
    pool_of_killed_encoder = tmp_path / f"vitrine-{'0' * 32}"
    pool_of_killed_encoder.touch()
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)  # connects, and never answers
    encoder = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    flags = ["--model", str(qwen3_vl_folder), "--encoders", encoder, "--port", "0", "--grpc-port", "0"]
    flags += ["--connect-timeout-s", "60", "--drain-timeout-s", str(DRAIN_TIMEOUT_S), "--shm-folder", str(tmp_path)]
    worker = ServiceProcess("vitrine_vlm.llm_worker", *flags)
    services.append(worker)
    url = f"http://{(await asyncio.to_thread(worker.wait_listening))['http']}"
    body = {"model": qwen3_vl_folder.name, "prompt": "Hello", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    async with silent, aiohttp.ClientSession() as session:
        while (stream := await session.post(f"{url}/v1/completions", json=body)).status == 503:  # it loads its model
            await asyncio.sleep(0.1)
        assert not pool_of_killed_encoder.exists(), "any service's start removes it"
        worker.process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        events = (await stream.content.read()).decode().strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "worker_unavailable"
        assert await ended(worker, since) == 0
    assert not any("SERVING" in line for line in worker.lines)


def slow_jpeg(side: int, num_scans: int) -> bytes:
    """A small file whose decoding takes long: a progressive JPEG that repeats its last scan, 0.1 s each."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data, end = file.getvalue()[:-2], file.getvalue()[-2:]
    return data + data[data.rindex(b"\xff\xda") :] * num_scans + end


async def test_an_encoder_ends_in_time_although_a_picture_is_still_decoded(
    qwen3_vl_folder: Path, services: list[ServiceProcess]
) -> None:
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--drain-timeout-s", str(DRAIN_TIMEOUT_S)]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags)
    services.append(encoder)
    addresses = await asyncio.to_thread(encoder.wait_serving)
    async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
        # Two streams that no client ends.
        session = encoder_pb2_grpc.EncoderStub(channel).Connect()
        hello = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=["grpc"])
        await session.write(encoder_pb2.ConnectRequest(hello=hello))
        assert await session.read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await watch.read()
        # A fast machine decodes one before the deadline, not eight: a comment in each makes all of them different.
        file = slow_jpeg(8000, 9)
        files = [file[:2] + b"\xff\xfe\x00\x03" + bytes([index]) + file[2:] for index in range(8)]
        items = [encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=each) for each in files]
        call = encoder_pb2_grpc.EncoderStub(channel).Encode(encoder_pb2.EncodeRequest(items=items))
        response = await call.read()
        assert isinstance(response, encoder_pb2.EncodeResponse) and response.WhichOneof("event") == "layout"
        await asyncio.sleep(0.2)
        encoder.process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        await asyncio.sleep(0.2)

        async def describe(new: grpc.aio.Channel) -> object:
            return await encoder_pb2_grpc.EncoderStub(new).Describe(encoder_pb2.DescribeRequest())

        answered = asyncio.create_task(answered_until_the_end(encoder, addresses["grpc"], describe))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata() or ())[ERROR_CODE_KEY] == "encoder_unavailable"
        await answered
        assert await ended(encoder, since) == 0
