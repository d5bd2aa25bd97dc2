"""What encoders send is read by SGLang's own receivers, out of the released wheels, over real sockets.

The wheels come from the package index; without one these tests fail.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.encoder_service.running import png
from tests.encoder_service.sglang.released_wheels import download_wheel, receiving_side
from tests.encoder_service.sglang.running_port import data_uri
from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.integration.media import clip
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.types import Layout, LayoutEvent, MediaItem

LANGUAGE_SERVER = Path(__file__).with_name("language_server.py")
OLD_MODULE = "sglang.srt.disaggregation.encode_receiver"
MODULE = "sglang.srt.disaggregation.encoder.receiver"
PICTURES = [png(64 + 32 * (number % 3), 64, number) for number in range(5)]
VIDEOS = [clip(number, 64, 64, 8 + 8 * number).data for number in range(3)]


def ask(wheel_folder: Path, task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs SGLang's side; returns the answers of all ranks by request."""
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder), "SGLANG_HOST_IP": "127.0.0.1"}
    command = [sys.executable, str(LANGUAGE_SERVER)]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        answers.setdefault(answer["rid"], []).append(answer)
    return answers


async def by_grpc(address: str, items: list[MediaItem]) -> tuple[list[Layout], torch.Tensor]:
    """Layouts and rows of the items, one behind the other."""
    client = EncoderClient([address], None, transport="grpc")
    await client.start()
    layouts: dict[int, Layout] = {}
    rows: dict[int, torch.Tensor] = {}
    async for event in client.encode(items, "r"):
        if isinstance(event, LayoutEvent):
            layouts[event.item_index] = event.layout
        else:
            rows[event.item_index] = event.rows.rows_TW.clone()  # type: ignore[attr-defined]
            event.rows.release()
    await client.close()
    return [layouts[index] for index in sorted(layouts)], torch.cat([rows[index] for index in sorted(rows)])


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("version", "module", "dtype", "delays"),
    [
        ("0.5.17", OLD_MODULE, "float32", (0.0, 0.5)),
        ("0.5.20", MODULE, "bfloat16", (0.5, 0.0)),
        ("0.5.23", MODULE, "bfloat16", (0.0, 0.5)),
    ],
)
async def test_a_language_server_gets_what_grpc_gives(
    version: str, module: str, dtype: str, delays: tuple[float, float], qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    wheel_folder = tmp_path / "receiving_side"
    receiving_side(await asyncio.to_thread(download_wheel, version, tmp_path), wheel_folder)
    bootstrap_port = free_port()
    common = ["--model", str(qwen3_vl_folder), "--port", "0", "--dtype", dtype]
    common += ["--sglang-version", version, "--sglang-receivers", "127.0.0.0/8"]
    common += ["--sglang-register", f"http://127.0.0.1:{bootstrap_port}"]
    encoders = [
        ServiceProcess("vitrine_vlm.encoder_service", *common, "--sglang-port", str(free_port())) for _ in range(2)
    ]
    try:
        for encoder in encoders:
            await asyncio.to_thread(encoder.wait_serving)
        pictures = [data_uri(picture) for picture in PICTURES]
        videos = [data_uri(video, "video/mp4") for video in VIDEOS]
        digest = f"sha256:{hashlib.sha256(PICTURES[0]).hexdigest()}"
        requests: list[dict[str, Any]] = [
            {"rid": "pictures", "images": pictures, "videos": []},
            {"rid": "one picture", "images": pictures[:1], "videos": [], "hashes": [digest]},
            {"rid": "both kinds", "images": pictures[:1], "videos": videos},
            {"rid": "bad", "images": [*pictures, data_uri(b"no picture")], "videos": []},
            {"rid": "audio", "images": [], "videos": [], "audios": ["data:audio/wav;base64,AAAA"]},
        ]
        if module != OLD_MODULE:  # which sends no hashes
            requests.append({"rid": "other", "images": pictures[1:2], "videos": [], "hashes": [digest]})
        task = {"module": module, "bootstrap_port": bootstrap_port, "num_encoders": 2, "requests": requests}
        task |= {"tp_size": 2, "delay_encode_s": delays[0], "delay_receivers_s": delays[1], "folder": str(tmp_path)}
        answers = await asyncio.to_thread(ask, wheel_folder, task)
        address = encoders[0].addresses["grpc"]
        images = await by_grpc(address, [MediaItem("image", data=picture) for picture in PICTURES])
        clips = await by_grpc(address, [MediaItem("video", data=video) for video in VIDEOS])
    finally:
        for encoder in encoders:
            encoder.stop()
    assert images[1].dtype is getattr(torch, dtype)
    bound = 1e-4 if dtype == "float32" else 0.05

    def check(answer: dict[str, Any], name: str, layouts: list[Layout], rows_TW: torch.Tensor) -> None:
        grids = "img_grid_thw" if name == "IMAGE" else "video_grid_thw"
        assert answer["status"] == "SUCCESS", answer
        assert answer["meta"][grids] == [list(layout.grid_thw) for layout in layouts]
        found = load_file(answer["rows"])[name]
        assert found.dtype is rows_TW.dtype and found.shape == rows_TW.shape
        assert (found - rows_TW).abs().max() < bound

    assert answers.keys() == {request["rid"] for request in requests}
    num_first = images[0][0].num_tokens
    for rank in (0, 1):
        check(answers["pictures"][rank], "IMAGE", *images)
        check(answers["one picture"][rank], "IMAGE", images[0][:1], images[1][:num_first])
        both = answers["both kinds"][rank]
        check(both, "IMAGE", images[0][:1], images[1][:num_first])
        check(both, "VIDEO", *clips)
        assert both["meta"]["video_timestamps"] == [list(layout.timestamps_s) for layout in clips[0]]
        assert both["meta"]["second_per_grid_ts"] == [layout.second_per_grid_t for layout in clips[0]]
        for rid, message in (("bad", "no valid image"), ("audio", "AUDIO"), ("other", "content_hash")):
            for answer in answers.get(rid, [])[rank : rank + 1]:
                failures = [[answer["message"], answer["code"]], *answer["dispatch_errors"]]
                assert answer["status"] == "FAIL"
                assert all(message in text and code == 400 for text, code in failures), answer
    assert sum(layout.num_tokens for layout in images[0]) == len(images[1])
