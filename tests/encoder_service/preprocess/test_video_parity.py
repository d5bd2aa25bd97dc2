"""Videos against transformers: its PyAV reader, then its video processors' torch path, equal bit for bit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from tests.encoder_service.preprocess import reference
from tests.encoder_service.preprocess.samples import IMAGE_CONFIGS, VIDEO_CONFIGS, settings, video
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.types import MediaOptions


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _read(folder: Path, data: bytes) -> tuple[torch.Tensor, VideoMetadata]:
    """Every frame, [T, C, H, W], and the metadata, by transformers' reader."""
    path = folder / "clip"
    path.write_bytes(data)
    frames, metadata = read_video_pyav(str(path), lambda metadata, **_: np.arange(metadata.total_num_frames))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), metadata


def _assert_equals_transformers(
    folder: Path,
    family: str,
    data: bytes,
    frames_TCHW: torch.Tensor,
    metadata: VideoMetadata,
    config: dict[str, Any] | None = None,
    video_fps: float | None = None,
) -> None:
    config = config or VIDEO_CONFIGS[family]
    opened = Preprocessor(settings(folder, family, IMAGE_CONFIGS[family], config), MediaLimits()).open(
        "video", data, MediaOptions(fps=video_fps)
    )
    expected = reference.video_processor(family, config)(
        videos=[frames_TCHW],
        video_metadata=[metadata],
        do_sample_frames=True,
        fps=video_fps or 2,
        return_metadata=True,
        return_tensors="pt",
    )
    assert [list(opened.layout.grid_thw)] == expected["video_grid_thw"].tolist()
    assert opened.layout.num_tokens == expected["video_grid_thw"].prod() // 4
    assert torch.equal(opened.patches(), expected["pixel_values_videos"])
    sampled = expected["video_metadata"][0]
    expected_times = Qwen3VLProcessor._calculate_timestamps(None, sampled.frames_indices.tolist(), sampled.fps, 2)
    assert list(opened.layout.timestamps_s) == expected_times
    assert opened.layout.second_per_grid_t == 2 / sampled.sampled_fps


@pytest.mark.parametrize("num_frames", [2, 3, 5, 23, 60])
@pytest.mark.parametrize("fps", [10, Fraction(30000, 1001)], ids=str)
def test_mp4_equals_transformers(tmp_path: Path, family: str, num_frames: int, fps: Fraction | int) -> None:
    data = video(num_frames, fps=fps)
    frames, metadata = _read(tmp_path, data)
    assert len(frames) == num_frames
    _assert_equals_transformers(tmp_path, family, data, frames, metadata)


def test_a_video_with_the_bounds_of_omnis_processor_equals_transformers(tmp_path: Path) -> None:
    data = video(23, 320, 200)
    _assert_equals_transformers(tmp_path, "qwen3_omni_moe", data, *_read(tmp_path, data))


@pytest.mark.parametrize("video_fps", [0.7, 4.0, 10.0])
def test_rate_of_the_request_equals_transformers(tmp_path: Path, family: str, video_fps: float) -> None:
    data = video(31)
    _assert_equals_transformers(tmp_path, family, data, *_read(tmp_path, data), video_fps=video_fps)


@pytest.mark.parametrize("bounds", [(4096, 30_000), (500_000, 900_000)], ids=str)
def test_pixel_bounds_equal_transformers(tmp_path: Path, family: str, bounds: tuple[int, int]) -> None:
    config = {name: value for name, value in VIDEO_CONFIGS[family].items() if name not in ("min_pixels", "max_pixels")}
    config["size"] = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    data = video(20, width=192, height=80)
    _assert_equals_transformers(tmp_path, family, data, *_read(tmp_path, data), config=config)


@pytest.mark.parametrize(
    ("container", "codec", "pixel_format"),
    [("webm", "libvpx", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("avi", "mjpeg", "yuvj420p"),
     ("gif", "gif", "rgb8"), ("mpegts", "libx264", "yuv420p"), ("mov", "mpeg4", "yuv420p")],
)  # fmt: skip
def test_other_containers_equal_transformers(
    tmp_path: Path, family: str, container: str, codec: str, pixel_format: str
) -> None:
    """Some declare no number of frames: EncodedVideo counts by decoding, and transformers gets that number."""
    data = video(17, container=container, codec=codec, pixel_format=pixel_format)
    path = tmp_path / "clip"
    path.write_bytes(data)
    frames, metadata = read_video_pyav(str(path), lambda metadata, **_: np.arange(17))
    metadata.total_num_frames = 17
    frames_TCHW = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    _assert_equals_transformers(tmp_path, family, data, frames_TCHW, metadata)


def test_one_frame_counts_as_two_equal_ones(tmp_path: Path) -> None:
    """transformers refuses such a video: the reference gets the frame twice, at half the rate."""
    data = video(1)
    frames, _ = _read(tmp_path, data)
    config = VIDEO_CONFIGS["qwen3_vl"]
    opened = Preprocessor(settings(tmp_path, "qwen3_vl", IMAGE_CONFIGS["qwen3_vl"], config), MediaLimits()).open(
        "video", data
    )
    expected = reference.video_processor("qwen3_vl", config)(
        videos=[frames.repeat(2, 1, 1, 1)], do_sample_frames=False, return_tensors="pt"
    )
    assert [list(opened.layout.grid_thw)] == expected["video_grid_thw"].tolist()
    assert torch.equal(opened.patches(), expected["pixel_values_videos"])
    assert opened.layout.timestamps_s == (0.0,)


def test_phone_video_is_turned_upright(tmp_path: Path, family: str) -> None:
    """The display matrix of the track says: show a quarter turn clockwise. torchcodec, transformers' default reader,
    applies it; the PyAV reader does not, so the reference turns the frames here."""
    data = bytearray(video(12))
    matrix = data.index(b"tkhd") + 44
    one, minus_one, zero = (value.to_bytes(4, "big", signed=True) for value in (1 << 16, -(1 << 16), 0))
    assert data[matrix : matrix + 4] == one
    data[matrix : matrix + 36] = (
        zero + one + zero + minus_one + zero + zero + zero + zero + (1 << 30).to_bytes(4, "big")
    )
    frames, metadata = _read(tmp_path, bytes(data))
    upright = torch.from_numpy(np.rot90(frames.numpy(), -1, axes=(2, 3)).copy())
    assert upright.shape[-2:] == (64, 48)
    _assert_equals_transformers(tmp_path, family, bytes(data), upright, metadata)
