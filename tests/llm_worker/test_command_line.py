"""`vitrine-llm`: errors at the start are reported; it serves text without encoders, and stops on a signal."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.integration.fleet import ServiceProcess
from vitrine_vlm.llm_worker.__main__ import main
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc

NO_ENCODER = ["--encoders", "127.0.0.1:9"]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process and returns its exit status and the last line of its log."""

    def run(*flags: str) -> tuple[int, str]:
        ports = ["--port", "0", "--grpc-port", "0"]
        monkeypatch.setattr("sys.argv", ["llm_worker", *ports, *NO_ENCODER, *flags])
        status = main()
        last = caplog.records[-1]
        assert last.exc_info is None
        return status, last.getMessage()

    return run


@pytest.fixture(scope="module")
def broken_folder(qwen3_vl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer and vision_config are missing."""
    folder = Path(shutil.copytree(qwen3_vl_folder, tmp_path_factory.mktemp("broken") / "checkpoint"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["video_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_errors_at_the_start_are_reported(
    start: Callable[..., tuple[int, str]], broken_folder: Path, qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    for flags, says in (
        (["--model", str(tmp_path)], str(tmp_path)),
        (["--model", str(broken_folder)], "--skip-tokenizer-init"),
        (["--model", str(broken_folder), "--skip-tokenizer-init"], "video_token_id"),
        (["--model", str(qwen3_vl_folder), "--tp", "4", "--device", "cpu"], "it can be 1 or 2"),
    ):
        status, last = start(*flags)
        assert (status, last.partition(":")[0]) == (1, "cannot start")
        assert says in last


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused(start: Callable[..., tuple[int, str]], qwen3_vl_folder: Path) -> None:
    status, last = start("--model", str(qwen3_vl_folder), "--tp", "64", "--device", "cuda")
    assert (status, last.partition(":")[0]) == (1, "cannot start")
    assert "--tp 64 needs as many GPUs, visible are" in last


def test_a_port_in_use_is_reported(start: Callable[..., tuple[int, str]], qwen3_vl_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flag in ("--port", "--grpc-port"):
            status, last = start("--model", str(qwen3_vl_folder), flag, port)
            assert (status, last.partition(":")[0]) == (1, "cannot start")
            assert port in last


def test_without_any_encoder_text_is_served_and_ready_says_why_not(qwen3_vl_folder: Path) -> None:
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--grpc-port", "0", *NO_ENCODER]
    worker = ServiceProcess(
        "vitrine_vlm.llm_worker", *flags, "--served-model-name", "mine", "--connect-timeout-s", "1", fork=False
    )
    try:
        base = f"http://{worker.wait_serving()['http']}"
        with pytest.raises(urllib.error.HTTPError) as not_ready:
            urllib.request.urlopen(f"{base}/ready", timeout=10)
        assert not_ready.value.code == 503
        [encoder] = json.load(not_ready.value)["encoders"]
        assert (encoder["address"], encoder["ready"]) == ("127.0.0.1:9", False)
        assert encoder["error"]

        body = json.dumps({"model": "mine", "prompt": "Hello", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{base}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            answer = json.load(response)
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("mine", 2)
    finally:
        status = worker.stop()
    assert status == 0, "\n".join(worker.lines)
    assert any("loading language weights" in line for line in worker.lines)


async def test_a_prefill_worker_finishes_its_own_answers_before_it_ends(qwen3_vl_folder: Path) -> None:
    """The gRPC server cannot wait for all calls, as sessions of decode workers never end."""
    flags = ["--model", str(qwen3_vl_folder), "--role", "prefill", "--port", "0", "--grpc-port", "0", *NO_ENCODER]
    worker = ServiceProcess("vitrine_vlm.llm_worker", *flags, "--connect-timeout-s", "1", fork=False)
    try:
        address = worker.wait_serving()["grpc"]
        sampling = llm_pb2.SamplingParams(max_tokens=1500, ignore_eos=True)
        request = llm_pb2.GenerateRequest(prompt=llm_pb2.Prompt(text="Hello"), sampling=sampling)
        async with grpc.aio.insecure_channel(address) as channel:
            responses = aiter(llm_pb2_grpc.LlmStub(channel).Generate(request))
            assert (await anext(responses)).WhichOneof("event") == "started"
            worker.process.send_signal(signal.SIGTERM)
            *_, last = [response async for response in responses]
        assert last.finished.num_completion_tokens == 1500
    finally:
        status = worker.stop()
    assert status == 0, "\n".join(worker.lines)
