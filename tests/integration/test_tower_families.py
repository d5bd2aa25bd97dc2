"""Families of which the encoder alone has its half: it answers as transformers does, a worker says what to do."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import read_video_pyav

from tests.encoder_service.models.reference import reference_from_folder, reference_rows
from tests.encoder_service.preprocess.reference import image_processor, video_processor
from tests.integration.fleet import ServiceProcess
from tests.integration.media import clip, picture
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.model_loading.checkpoint import Checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import Layout, LayoutEvent, MediaItem, RowsEvent

MAX_DIFFERENCE = 1e-4
OUT_HIDDEN_SIZE = 96
DEEPSTACK = {"qwen3_5": [], "qwen3_5_moe": [], "qwen4_exp": [], "qwen3_omni_moe": [1, 2, 3]}
VIDEO_FPS = 2.0


async def test_an_encoder_process_encodes_as_transformers_does(tower_only_folder: Path, tmp_path: Path) -> None:
    folder = tower_only_folder
    model_type = AutoConfig.from_pretrained(folder).model_type
    media = [picture(1, 200, 120), clip(2, 96, 64, 21)]
    flags = ["--model", str(folder), "--port", "0", "--shm-folder", str(tmp_path), "--pool-bytes", "16777216"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags)
    try:
        address = (await asyncio.to_thread(encoder.wait_serving))["grpc"]
        async with grpc.aio.insecure_channel(address) as channel:
            description = await encoder_pb2_grpc.EncoderStub(channel).Describe(encoder_pb2.DescribeRequest())
        assert (description.model_type, description.out_hidden_size) == (model_type, OUT_HIDDEN_SIZE)
        assert list(description.deepstack_visual_indexes) == DEEPSTACK[model_type]

        client = EncoderClient([address], None, transport="shm", shm_folder=tmp_path)
        await client.start()
        await client.wait_ready(60)
        layouts: dict[int, Layout] = {}
        rows_TW: dict[int, torch.Tensor] = {}
        items = [MediaItem(kind=item.kind, data=item.data) for item in media]
        async for event in client.encode(items, "r"):
            if isinstance(event, LayoutEvent):
                layouts[event.item_index] = event.layout
            else:
                assert isinstance(event, RowsEvent)
                rows_TW[event.item_index] = landed(event, layouts[event.item_index], len(DEEPSTACK[model_type]))
        await client.close()
    finally:
        status = await asyncio.to_thread(encoder.stop)
    assert status == 0, "\n".join(encoder.lines)

    tower = reference_from_folder(folder)
    for index, processed in enumerate((processed_image(folder, media[0].data), processed_video(folder, media[1].data))):
        patches, grid_thw = processed
        assert layouts[index].grid_thw == grid_thw
        expected_TW = reference_rows(tower, patches, [grid_thw])
        assert expected_TW.std() > 0.1, "weights too small for a difference to show"
        assert (rows_TW[index] - expected_TW).abs().max() <= MAX_DIFFERENCE
    video, sampled = layouts[1], sampled_frames(folder, media[1].data)
    assert list(video.timestamps_s) == Qwen3VLProcessor._calculate_timestamps(None, list(sampled), 8.0, 2)


def landed(event: RowsEvent, layout: Layout, num_deepstack: int) -> torch.Tensor:
    """The rows of an item, [T, W]; they are released."""
    main_TC = torch.empty(layout.num_tokens, OUT_HIDDEN_SIZE)
    deepstack_NTC = torch.empty(num_deepstack, layout.num_tokens, OUT_HIDDEN_SIZE) if num_deepstack else None
    event.rows.copy_to(main_TC, deepstack_NTC, 0)
    event.rows.check()
    event.rows.release()
    return torch.cat([main_TC, *(deepstack_NTC if deepstack_NTC is not None else ())], dim=1)


def processed_image(folder: Path, data: bytes) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """transformers' patches of an image, and their grid."""
    config = Checkpoint(folder, "", "").json("preprocessor_config.json")
    processed = image_processor(config)(images=[Image.open(io.BytesIO(data))], return_tensors="pt")
    t, h, w = processed["image_grid_thw"][0].tolist()
    return processed["pixel_values"], (t, h, w)


def processed_video(folder: Path, data: bytes) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """transformers' patches of a video, and their grid."""
    processed = _processed_video(folder, data)
    t, h, w = processed["video_grid_thw"][0].tolist()
    return processed["pixel_values_videos"], (t, h, w)


def sampled_frames(folder: Path, data: bytes) -> list[int]:
    indices: list[int] = _processed_video(folder, data)["video_metadata"][0].frames_indices.tolist()
    return indices


def _processed_video(folder: Path, data: bytes) -> Any:
    checkpoint = Checkpoint(folder, "", "")
    config = checkpoint.json("video_preprocessor_config.json") or checkpoint.json("preprocessor_config.json")
    model_type = checkpoint.config["model_type"]
    # What this processor hands to its video processor in every call; it cannot itself be built without torchvision.
    sizes = Qwen3OmniMoeProcessor.videos_kwargs if model_type == "qwen3_omni_moe" else {}
    frames, metadata = read_video_pyav(io.BytesIO(data), lambda metadata, **_: np.arange(metadata.total_num_frames))
    return video_processor(model_type, config)(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()],
        video_metadata=[metadata],
        do_sample_frames=True,
        fps=VIDEO_FPS,
        return_metadata=True,
        return_tensors="pt",
        **sizes,
    )


@pytest.mark.parametrize(
    ("fixture", "architecture"),
    [
        ("qwen3_5_folder", "Qwen3_5ForConditionalGeneration"),
        ("qwen3_omni_moe_folder", "Qwen3OmniMoeForConditionalGeneration"),
    ],
)
def test_a_worker_process_names_the_architecture_and_who_has_it(
    request: pytest.FixtureRequest, fixture: str, architecture: str
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    command = [
        sys.executable,
        "-m",
        "vitrine_vlm.llm_worker",
        "--model",
        str(folder),
        "--encoders",
        "127.0.0.1:1",
        "--port",
        "0",
    ]
    finished = subprocess.run([*command, "--grpc-port", "0"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1, finished.stderr
    assert f"this worker has no text model for {architecture}" in finished.stderr
    assert "vLLM or SGLang" in finished.stderr
    assert "Traceback" not in finished.stderr
