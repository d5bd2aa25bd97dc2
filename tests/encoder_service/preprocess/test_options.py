"""Options of a request against transformers' processors, called with the same keyword arguments: equal bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from tests.encoder_service.preprocess import reference
from tests.encoder_service.preprocess.samples import IMAGE_CONFIGS, VIDEO_CONFIGS, encode, photo, settings, video
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia, Preprocessor
from vitrine_vlm.errors import MediaError, MediaTooLarge, NotAnImage
from vitrine_vlm.types import MediaOptions

SMALL = MediaLimits(max_pixels=100_000, max_video_pixels=400_000)


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl", "qwen3_omni_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def preprocessor(folder: Path, family: str, limits: MediaLimits | None = None) -> Preprocessor:
    found = settings(folder, family, IMAGE_CONFIGS[family], VIDEO_CONFIGS[family])
    return Preprocessor(found, limits or MediaLimits())


@pytest.mark.parametrize("size", [(451, 300), (64, 64), (1200, 10)], ids=str)
@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (MediaOptions(max_pixels=20_000), {"max_pixels": 20_000}),
        (MediaOptions(min_pixels=300_000), {"min_pixels": 300_000}),
        (MediaOptions(3136, 50_000), {"size": {"shortest_edge": 3136, "longest_edge": 50_000}}),
        (MediaOptions(), {}),
    ],
    ids=["max", "min", "size", "none"],
)
def test_an_image(
    tmp_path: Path, family: str, size: tuple[int, int], options: MediaOptions, kwargs: dict[str, Any]
) -> None:
    image = photo(*size)
    opened = preprocessor(tmp_path, family).open("image", encode(image), options)
    expected = reference.image_processor(IMAGE_CONFIGS[family])(images=[image], return_tensors="pt", **kwargs)
    assert [list(opened.layout.grid_thw)] == expected["image_grid_thw"].tolist()
    assert torch.equal(opened.patches(), expected["pixel_values"])


def read(folder: Path, data: bytes) -> tuple[torch.Tensor, VideoMetadata]:
    """Every frame, [T, C, H, W], and the metadata, by transformers' reader."""
    (folder / "clip").write_bytes(data)
    frames, metadata = read_video_pyav(str(folder / "clip"), lambda metadata, **_: np.arange(metadata.total_num_frames))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), metadata


def assert_equal(opened: OpenedMedia, expected: Any) -> None:
    """Compares grid, times and patches of a video."""
    assert [list(opened.layout.grid_thw)] == expected["video_grid_thw"].tolist()
    assert torch.equal(opened.patches(), expected["pixel_values_videos"])
    sampled = expected["video_metadata"][0]
    indices = list(map(int, sampled.frames_indices))
    assert list(opened.layout.timestamps_s) == Qwen3VLProcessor._calculate_timestamps(None, indices, sampled.fps, 2)
    assert opened.layout.second_per_grid_t == 2 / sampled.sampled_fps


SIZE = {"size": {"shortest_edge": 4096, "longest_edge": 60_000}}


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        (MediaOptions(fps=4.0), {"fps": 4.0}),
        (MediaOptions(num_frames=8), {"num_frames": 8}),
        (MediaOptions(num_frames=5), {"num_frames": 5}),
        (MediaOptions(sampled=False), {"do_sample_frames": False}),
        (MediaOptions(4096, 60_000), SIZE),
        (MediaOptions(4096, 60_000, num_frames=12), {"num_frames": 12, **SIZE}),
        (MediaOptions(fps=3.0, max_frames=6), {"fps": 3.0, "max_frames": 6}),
        (MediaOptions(min_frames=20), {"min_frames": 20}),
    ],
    ids=str,
)
def test_a_video(tmp_path: Path, family: str, options: MediaOptions, kwargs: dict[str, Any]) -> None:
    data = video(41, width=192, height=80)
    frames, metadata = read(tmp_path, data)
    # Bounds of the number of frames are not passed on by Qwen3VLVideoProcessor's call: its attributes count.
    config = VIDEO_CONFIGS[family] | {name: kwargs[name] for name in ("min_frames", "max_frames") if name in kwargs}
    call = {"do_sample_frames": True} | {
        name: each for name, each in kwargs.items() if name not in config or name == "size"
    }
    # None: the call puts the class's own rate beside a number, which it then refuses.
    call.setdefault("fps", None if "num_frames" in call else 2)
    expected = reference.video_processor(family, config)(
        videos=[frames], video_metadata=[metadata], return_metadata=True, return_tensors="pt", **call
    )
    if expected["video_metadata"][0].frames_indices is None:
        expected["video_metadata"][0].frames_indices = list(range(41))
    assert_equal(preprocessor(tmp_path, family).open("video", data, options), expected)


def test_more_frames_than_there_are(tmp_path: Path, family: str) -> None:
    """Qwen3-VL's processor repeats frames; the other one refuses, and all frames are taken instead."""
    data = video(6, width=192, height=80)
    opened = preprocessor(tmp_path, family).open("video", data, MediaOptions(num_frames=10))
    frames, metadata = read(tmp_path, data)
    processor = reference.video_processor(family, VIDEO_CONFIGS[family])
    if family == "qwen3_vl":
        expected = processor(
            videos=[frames],
            video_metadata=[metadata],
            num_frames=10,
            fps=None,
            return_metadata=True,
            return_tensors="pt",
        )
        assert_equal(opened, expected)
        return
    with pytest.raises(ValueError, match="exceeds"):
        processor(videos=[frames], video_metadata=[metadata], num_frames=10, do_sample_frames=True)
    assert opened.layout.grid_thw[0] == 3


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
@pytest.mark.parametrize("options", [MediaOptions(fps=4.0), MediaOptions(), MediaOptions(4096, 30_000)], ids=str)
def test_a_list_of_frames(tmp_path: Path, family: str, num_frames: int, options: MediaOptions) -> None:
    pictures = [photo(120, 90, seed) for seed in range(num_frames)]
    files = [encode(each) for each in pictures]
    opened = preprocessor(tmp_path, family).open_frames(files, options)
    frames = torch.stack([torch.from_numpy(np.asarray(each)).permute(2, 0, 1) for each in pictures])
    metadata = VideoMetadata(total_num_frames=num_frames, fps=options.fps or 2, frames_indices=list(range(num_frames)))
    if num_frames == 1:  # counts as that frame twice; the processor of Qwen3-VL refuses one alone
        frames = frames.repeat(2, 1, 1, 1)
    size = {} if options.max_pixels is None else {"size": {"shortest_edge": 4096, "longest_edge": 30_000}}
    expected = reference.video_processor(family, VIDEO_CONFIGS[family])(
        videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_metadata=True, return_tensors="pt",
        **size,
    )  # fmt: skip
    expected["video_metadata"] = [metadata]
    assert_equal(opened, expected)


def test_a_part_of_a_video(tmp_path: Path, family: str) -> None:
    """The range is qwen-vl-utils' `calculate_video_frame_range`: frames 10 to 30; times stay those of the video."""
    data = video(41, width=192, height=80)
    opened = preprocessor(tmp_path, family).open("video", data, MediaOptions(fps=2.0, start_s=0.95, end_s=3.09))
    frames, _ = read(tmp_path, data)
    part = VideoMetadata(total_num_frames=21, fps=10.0)
    processor = reference.video_processor(family, VIDEO_CONFIGS[family])
    indices = (torch.as_tensor(processor.sample_frames(part, fps=2.0)) + 10).tolist()
    assert indices[0] == 10 and indices[-1] <= 30
    part.frames_indices = indices
    expected = processor(
        videos=[frames[indices]],
        video_metadata=[part],
        do_sample_frames=False,
        return_metadata=True,
        return_tensors="pt",
    )
    expected["video_metadata"] = [part]
    assert_equal(opened, expected)
    for bad in (MediaOptions(start_s=9.0), MediaOptions(start_s=1.0, end_s=1.05), MediaOptions(end_s=0.0)):
        with pytest.raises(MediaError, match="no two frames"):
            preprocessor(tmp_path, family).open("video", data, bad)


PICTURE, CLIP = encode(photo(100, 80)), video(10, width=192, height=80)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("image", MediaOptions(min_pixels=200_000), "at most 100000 are accepted"),
        ("image", MediaOptions(min_pixels=2**63, max_pixels=2**63), "at most 100000 are accepted"),
        ("video", MediaOptions(min_pixels=2**63, max_pixels=2**63), "at most 100000 are accepted"),
        ("video", MediaOptions(num_frames=2**32 - 1), "within the limit of 400000 pixels"),
        ("video", MediaOptions(num_frames=600), "within the limit of 400000 pixels"),
        ("video", MediaOptions(sampled=False, min_pixels=90_000, max_pixels=100_000), "at most"),
    ],
)
def test_the_operators_limits_hold(tmp_path: Path, family: str, kind: str, options: MediaOptions, message: str) -> None:
    with pytest.raises(MediaTooLarge, match=message):
        opened = preprocessor(tmp_path, family, SMALL).open(
            "image" if kind == "image" else "video", PICTURE if kind == "image" else CLIP, options
        )
        # Of the whole volume for Qwen3-VL: these bounds are small ones there.
        assert family == "qwen3_vl" and options.sampled is False and opened.layout.num_tokens < 100
        raise MediaTooLarge("at most")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("image", MediaOptions(num_frames=4), "an image has no num_frames"),
        ("image", MediaOptions(start_s=1.0, sampled=True), "an image has no sampled, start_s"),
        ("image", MediaOptions(min_pixels=0), "min_pixels is 0"),
        ("image", MediaOptions(min_pixels=9, max_pixels=8), "min_pixels 9 and max_pixels 8"),
        ("video", MediaOptions(num_frames=0), "num_frames is 0"),
        ("video", MediaOptions(fps=2.0, num_frames=4), "num_frames 4 and fps 2.0"),
        ("video", MediaOptions(num_frames=5, max_frames=4), "num_frames 5 and max_frames 4"),
        ("video", MediaOptions(sampled=False, fps=2.0), "sampled False and fps 2.0"),
        ("video", MediaOptions(min_frames=9, max_frames=8), "min_frames 9 and max_frames 8"),
        ("video", MediaOptions(start_s=float("nan")), "start_s is nan"),
        ("video", MediaOptions(end_s=-1.0), "end_s is -1"),
        ("list", MediaOptions(num_frames=2), "a list of frames, all of which are used, has no num_frames"),
        ("list", MediaOptions(sampled=True), "has no sampled"),
        ("list", MediaOptions(fps=0.0), "video_fps is 0"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, kind: str, options: MediaOptions, message: str) -> None:
    prepares = preprocessor(tmp_path, "qwen3_vl")
    with pytest.raises(MediaError, match=message):
        if kind == "list":
            prepares.open_frames([PICTURE, PICTURE], options)
        else:
            prepares.open("image" if kind == "image" else "video", PICTURE if kind == "image" else CLIP, options)


def test_frames_that_cannot_be_a_video(tmp_path: Path) -> None:
    prepares = preprocessor(tmp_path, "qwen3_vl", SMALL)
    with pytest.raises(NotAnImage, match="frame 1: the image file is empty"):
        prepares.open_frames([PICTURE, b""])
    with pytest.raises(MediaError, match="frame 1: it has 80x100 pixels, the first frame 100x80"):
        prepares.open_frames([PICTURE, encode(photo(80, 100))])
    with pytest.raises(MediaTooLarge, match="frame 1: an image of 1000x1000"):
        prepares.open_frames([PICTURE, encode(Image.new("1", (1000, 1000)))])
    with pytest.raises(MediaTooLarge, match="sampled frames"):
        prepares.open_frames([PICTURE] * 400, MediaOptions(min_pixels=4096 * 400, max_pixels=4096 * 400))
    file = io.BytesIO()
    photo(100, 80).save(file, "JPEG")
    cut = prepares.open_frames([file.getvalue(), file.getvalue()[:-300]])
    with pytest.raises(MediaError, match="frame 1: "):
        cut.patches()
