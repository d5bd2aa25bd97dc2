"""The application on a real Ray: both ingresses, replicas that come and go, a killed encoder."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.util import list_named_actors

from tests.deploy.ray_serve.load import QUESTION, Load, encode, next_picture
from tests.deploy.ray_serve.running import APPLICATION, Running, running_application
from tests.encoder_service.running import run_encoder
from vitrine_vlm.deploy.launcher.ask import ask
from vitrine_vlm.deploy.launcher.picture import picture_url
from vitrine_vlm.deploy.ray_serve.application import build
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and listens on 127.0.0.2"),
    pytest.mark.timeout(480),  # Ray starts a dozen processes, and a test waits several times
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),  # its heir does nothing yet
]

MODEL = MODEL_FOLDER.name
# Others use the machine, too.
PATIENCE_S = 120.0
QUICK = {"num_cpus": 0.1, "look_back_s": 2.0, "upscale_delay_s": 0.5, "health_check_period_s": 0.5}


@pytest.fixture(scope="module")
def application() -> Iterator[Running]:
    encoders = QUICK | {"max_replicas": 2, "target_queue_s": 0.3, "downscale_delay_s": 2.0}
    arguments = {
        "model": str(MODEL_FOLDER),
        "encoders": encoders | {"settings": {"drain_timeout_s": 5, "pool_bytes": 8 << 20, "log_format": "json"}},
        "llm": QUICK | {"settings": {"drain_timeout_s": 5, "log_format": "json"}},
        "gateway": {"num_cpus": 0.1, "retry_s": PATIENCE_S},
    }
    with running_application(arguments) as running:
        yield running


async def wait_until(condition: Callable[[], bool], what: str) -> float:
    """Seconds it took; the condition may block."""
    start = time.monotonic()
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < start + PATIENCE_S, f"waited in vain for {what}"
        await asyncio.sleep(0.2)
    return time.monotonic() - start


async def worker_knows_encoders(application: Running, at_least: int = 1) -> None:
    """Returns once the LLM worker is connected to the encoders that run, whichever these are by then, and no others."""
    async with serve.get_deployment_handle("LlmWorker", APPLICATION).choose_replica(b"", []) as replica:
        url = f"http://{replica.replica_metadata['address']}/ready"
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            running = await asyncio.to_thread(application.encoder_addresses)
            async with session.get(url) as response:
                encoders = (await response.json())["encoders"]
            known = [each["address"] for each in encoders if each["ready"]]
            if len(running) >= at_least and sorted(known) == sorted(running):
                return
            await asyncio.sleep(0.2)


async def test_chat_over_http_streams_the_right_answer(application: Running) -> None:
    pieces: list[str] = []
    answer = await ask(application.base_url, picture_url(None), QUESTION, max_tokens=64, show=pieces.append)
    assert "".join(pieces) == "A red circle, a blue square and a green triangle."
    assert len(pieces) > 5, "the answer came at once, not as a stream"
    assert answer.finish_reason == "stop"


async def test_http_passes_errors_on_and_other_paths_not_in(application: Running) -> None:
    async with aiohttp.ClientSession(application.base_url) as session:
        async with session.get("/elsewhere") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "invalid_request"
        messages = [{"role": "user", "content": "Hello"}]
        async with session.post("/v1/chat/completions", json={"model": "other", "messages": messages}) as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "model_not_found"


async def test_the_door_has_probes_and_says_where_metrics_are(application: Running) -> None:
    wanted = {"vitrine-encoder": "vitrine_encoder_queue_seconds", "vitrine-llm": "vitrine_llm_load"}
    async with aiohttp.ClientSession(application.base_url) as session:
        for path in ("/health", "/ready", "/version", "/dashboard"):
            async with session.get(path) as response:
                assert response.status == 200, path
        # As Prometheus takes it: HTTP service discovery ends with an error on anything else.
        async with session.get("/metrics/targets") as response:
            assert (response.status, response.content_type) == (200, "application/json")
            targets = await response.json()
        for target in targets:
            assert target.keys() == {"targets", "labels"}
            assert all(re.fullmatch(r"[a-zA-Z_]\w*", label) for label in target["labels"])
            assert all(isinstance(value, str) and value for value in target["labels"].values())
        found = {target["labels"]["job"]: target for target in targets}
        assert found.keys() == wanted.keys() and len(targets) == 2
        async with session.get("/metrics") as response:
            at_the_door = await response.text()
        for job, series in wanted.items():
            async with session.get(f"http://{found[job]['targets'][0]}/metrics") as response:
                assert f"\n{series} " in await response.text()
            async with session.get("/metrics", params={"job": job}) as response:
                text = await response.text()
                assert [name for name in wanted.values() if f"\n{name}{{" in text] == [series]
            [line] = [each for each in at_the_door.splitlines() if each.startswith(f"{series}{{")]
            assert f'pod="{found[job]["labels"]["pod"]}"' in line and f'job="{job}"' in line
    async with grpc.aio.insecure_channel(application.grpc_address) as channel:
        for service in ("", "vitrine.encoder.v1.Encoder"):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_lines_of_services_are_in_the_logs_of_their_replicas(application: Running) -> None:
    await ask(application.base_url, picture_url(None), QUESTION, max_tokens=4, show=lambda piece: None)

    def lines(deployment: str) -> list[dict[str, Any]]:
        files = application.logs.glob(f"replica_{APPLICATION}_{deployment}_*.log")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def answered_chats() -> list[dict[str, Any]]:
        return [line for line in lines("LlmWorker") if line["message"].startswith("POST /v1/chat/completions: 200 in ")]

    await wait_until(lambda: bool(answered_chats()), "the line of a request")
    answered = answered_chats()[0]
    assert answered["status"] == 200
    assert answered["request_id"].startswith("chatcmpl-") and answered["completion_tokens"] > 0

    def encoded_lines() -> list[dict[str, Any]]:
        return [line for line in lines("Encoder") if line.get("request_id") == answered["request_id"]]

    await wait_until(lambda: bool(encoded_lines()), "the line of the encoder's call")
    encoded = encoded_lines()[0]
    assert (encoded["levelname"], encoded["deployment"]) == ("INFO", f"{APPLICATION}_Encoder")


async def test_encode_over_grpc_gives_the_rows_of_an_encoder(application: Running, tmp_path: Path) -> None:
    pictures = [next_picture() for _ in range(3)]
    async with run_encoder(MODEL_FOLDER, tmp_path) as alone:
        expected = [alone.rows_of(picture) for picture in pictures]
    async with grpc.aio.insecure_channel(application.grpc_address) as channel:
        description = await encoder_pb2_grpc.EncoderStub(channel).Describe(encoder_pb2.DescribeRequest())
        found = await encode(channel, pictures)
    assert (description.model, list(description.transports)) == (MODEL, ["grpc"])
    for expected_TW, (layout, rows) in zip(expected, found, strict=True):
        rows_TW = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(layout.num_tokens, -1)
        torch.testing.assert_close(rows_TW, expected_TW, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (encoder_pb2.EncodeRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (encoder_pb2.EncodeRequest(session_id="elsewhere"), grpc.StatusCode.FAILED_PRECONDITION),
        (encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem()]), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_refused_encode_calls_end_with_a_status(
    application: Running, refused: encoder_pb2.EncodeRequest, status: grpc.StatusCode
) -> None:
    async with grpc.aio.insecure_channel(application.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in encoder_pb2_grpc.EncoderStub(channel).Encode(refused):
                pass
    assert error.value.code() == status


async def test_load_brings_encoders_and_quiet_takes_them_away(application: Running) -> None:
    async with Load.running(application, MODEL, num_encoding=12, num_chatting=1) as high:
        up_s = await wait_until(lambda: application.num_running("Encoder") == 2, "a second encoder")
        await worker_knows_encoders(application, at_least=2)
    # Encoders count load in seconds by their own measure: on a busy machine one large picture is a lot.
    async with Load.running(application, MODEL, num_encoding=1, num_chatting=1, pause_s=0.3, size=(96, 64)) as low:
        down_s = await wait_until(lambda: application.num_running("Encoder") == 1, "the second encoder to go")
        await worker_knows_encoders(application)
    print(f"2 encoders after {up_s:.1f} s, 1 again after {down_s:.1f} s; high load {high}, low load {low}")
    assert not high.errors + low.errors
    assert high.num_encoded and high.num_chats and low.num_encoded and low.num_chats


async def test_killed_encoder_is_replaced_and_no_request_is_lost(application: Running) -> None:
    await wait_until(lambda: len(application.encoder_addresses()) == 1, "one encoder alone")
    [address] = await asyncio.to_thread(application.encoder_addresses)
    async with Load.running(application, MODEL, num_encoding=2, num_chatting=2) as load:
        await wait_until(lambda: load.num_encoded > 3 and load.num_chats > 3, "requests in flight")
        os.kill(application.pid_of_encoder(address), signal.SIGKILL)
        num_before = load.num_encoded, load.num_chats

        replaced_s = await wait_until(lambda: bool(set(application.encoder_addresses()) - {address}), "another encoder")
        await worker_knows_encoders(application)
        await wait_until(
            lambda: load.num_encoded > num_before[0] + 4 and load.num_chats > num_before[1] + 4, "work on the new one"
        )
    print(f"replaced after {replaced_s:.1f} s; load {load}")
    assert not load.errors


async def deploy_without_room(num_encoders: int) -> None:
    """Returns once all replicas of the application wait for a GPU, but for its gateway, and none is left to stop."""
    pool = {"num_gpus": 1, "settings": {"drain_timeout_s": 120}}
    encoders = pool | {"min_replicas": num_encoders, "max_replicas": num_encoders}
    arguments = {"model": str(MODEL_FOLDER), "encoders": encoders, "llm": pool, "gateway": {"num_cpus": 0.1}}
    target = serve.RunTarget(build(ServeArguments.model_validate(arguments)), name="no-room", route_prefix="/no-room")
    deploy = partial(serve.run_many, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    await asyncio.to_thread(deploy, [target])
    expected = {
        "Encoder": {ReplicaState.STARTING: num_encoders},
        "LlmWorker": {ReplicaState.STARTING: 1},
        "Gateway": {ReplicaState.RUNNING: 1},
    }

    def are_waiting() -> bool:
        found = serve.status().applications["no-room"].deployments
        return {name: each.replica_states for name, each in found.items()} == expected

    waited_s = await wait_until(are_waiting, "replicas that wait for a GPU")
    print(f"{num_encoders} encoders wait for a GPU after {waited_s:.1f} s")


async def test_replicas_that_were_never_placed_are_gone_at_once(application: Running) -> None:
    await deploy_without_room(2)
    # One encoder fewer, and new ones in place of all others: Ray Serve alone would wait for twice the 125 s that they
    # may take to drain, longer than `wait_until` does.
    await deploy_without_room(1)
    begin = time.monotonic()
    await asyncio.to_thread(serve.delete, "no-room")
    gone_s = time.monotonic() - begin
    print(f"gone after {gone_s:.1f} s")
    assert gone_s < 60


async def test_a_shutdown_does_not_wait_for_what_was_never_placed(application: Running) -> None:
    """The last test: nothing serves afterwards."""
    await deploy_without_room(1)
    begin = time.monotonic()
    await asyncio.to_thread(serve.shutdown)

    def is_gone() -> bool:
        return not any(actor["name"].startswith("SERVE_") for actor in list_named_actors(all_namespaces=True))

    await wait_until(is_gone, "the end of Ray Serve")
    gone_s = time.monotonic() - begin
    print(f"shut down after {gone_s:.1f} s")
    assert gone_s < 60
