"""The launcher as a newcomer runs it: real services, one question, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.deploy.proc import children_of, is_running

TIMEOUT_S = 180.0
STAGES = ("load", "preprocess", "encode", "ship", "land", "prefill", "decode")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(*arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vitrine_vlm.deploy.launcher", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def test_run_prints_answer_and_timings(qwen3_vl_folder: Path) -> None:
    with launch("run", "--model", str(qwen3_vl_folder), "--max-tokens", "24") as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    answer = re.search(r"^answer: (.+?)\n\nstage", output, re.MULTILINE | re.DOTALL)
    assert answer is not None, output
    assert len(answer[1]) == 24, "one character a token"
    for stage in STAGES:
        line = re.search(rf"^{stage} +([\d.]+) ", output, re.MULTILINE)
        assert line is not None, f"no time for {stage}:\n{output}"
    assert float(re.search(r"^encode +([\d.]+)", output, re.MULTILINE)[1]) > 0.0  # type: ignore[index]
    assert "24 generated (length)" in output
    assert "[encoder]" in output
    assert "[llm]" in output


def test_run_without_a_model_answers_right_in_any_folder(tmp_path: Path) -> None:
    """Folders of the working directory named like imported packages are not imported."""
    for name in ("protos", "encoder_service", "llm_worker", "vitrine_vlm", "torch", "grpc", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the working directory')")
    with launch("run", folder=tmp_path) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert "\nanswer: A red circle, a blue square and a green triangle.\n" in output


def test_run_asks_about_the_picture_and_with_the_prompt_that_are_given(tmp_path: Path) -> None:
    picture = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 120, 120), fill="blue")
    picture.save(tmp_path / "ball.png")
    with launch("run", "--image", str(tmp_path / "ball.png"), "--prompt", "What color is the circle?") as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert "\nanswer: blue\n" in output, output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_serve_answers_and_leaves_nothing_behind(qwen3_vl_folder: Path, signal_number: signal.Signals) -> None:
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, grpc_port = free.getsockname()[1], other.getsockname()[1]
    ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
    with launch("serve", "--model", str(qwen3_vl_folder), *ports) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "gRPC endpoint" in line:
                assert f"127.0.0.1:{grpc_port} " in line
            if "OpenAI endpoint" in line:
                break
        else:
            pytest.fail("the services did not get ready")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
            assert json.load(response)["data"][0]["id"] == qwen3_vl_folder.name
        children = children_of(process.pid)
        assert len(children) == 2
        process.send_signal(signal_number)
        process.stdout.read()
    assert process.returncode == (0 if signal_number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 15.0
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "a service outlived the launcher"
        time.sleep(0.05)


def test_unusable_model_is_a_clear_failure(tmp_path: Path) -> None:
    with launch("run", "--model", str(tmp_path / "nothing-here")) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "nothing-here" in output
    assert re.search(r"vitrine: (encoder|llm) ended with exit code \d+", output), output
