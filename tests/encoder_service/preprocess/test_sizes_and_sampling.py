"""Resized sizes, sampled frames and times against transformers' functions, over many values."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from tests.encoder_service.preprocess import reference
from tests.encoder_service.preprocess.samples import IMAGE_CONFIGS, VIDEO_CONFIGS, settings
from vitrine_vlm.encoder_service.preprocess.frame_sampling import sample_frames, second_per_grid_t, timestamps_s
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.encoder_service.preprocess.smart_resize import resized_image_size, resized_video_size
from vitrine_vlm.errors import BadAspectRatio, MediaError
from vitrine_vlm.types import MediaOptions


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl", "qwen3_omni_moe"])
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family_settings(model_type: str, tmp_path: Path) -> ProcessorSettings:
    return settings(tmp_path, model_type, IMAGE_CONFIGS[model_type], VIDEO_CONFIGS[model_type])


def test_image_sizes_equal_transformers(model_type: str, family_settings: ProcessorSettings) -> None:
    processor = reference.image_processor(IMAGE_CONFIGS[model_type])
    rng = random.Random(0)
    for _ in range(3000):
        height, width = (int(2 ** rng.uniform(0, 14)) for _ in range(2))
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(BadAspectRatio, match=f"{width}x{height}"):
                resized_image_size(family_settings, height, width)
            continue
        resized_height, resized_width = resized_image_size(family_settings, height, width)
        patch = family_settings.patch_size
        expected = processor.get_number_of_image_patches(height, width)
        assert resized_height // patch * (resized_width // patch) == expected, (height, width)
        assert resized_height % family_settings.factor == resized_width % family_settings.factor == 0


def test_video_sizes_equal_transformers(model_type: str, family_settings: ProcessorSettings) -> None:
    processor = reference.video_processor(model_type, VIDEO_CONFIGS[model_type])
    rng = random.Random(1)
    compared = 0
    for _ in range(3000):
        height, width = (int(2 ** rng.uniform(2, 12)) for _ in range(2))
        num_frames = rng.randint(2, 768)
        try:
            expected = processor.get_num_of_video_patches(num_frames, height, width, {})
        except ValueError:
            with pytest.raises(BadAspectRatio):
                resized_video_size(family_settings, num_frames, height, width)
            continue
        resized_height, resized_width = resized_video_size(family_settings, num_frames, height, width)
        patch = family_settings.patch_size
        grid_t = -(-num_frames // 2)
        assert grid_t * (resized_height // patch) * (resized_width // patch) == expected, (num_frames, height, width)
        compared += 1
    assert compared > 1000


def test_ratio_of_exactly_200_is_accepted(family_settings: ProcessorSettings) -> None:
    assert resized_image_size(family_settings, 16, 3200)
    with pytest.raises(BadAspectRatio, match=r"201\.0, at most 200"):
        resized_image_size(family_settings, 16, 3216)


@pytest.mark.parametrize("video_fps", [None, 0.5, 1.0, 3.7, 30.0])
def test_sampled_frames_equal_transformers(
    model_type: str, family_settings: ProcessorSettings, video_fps: float | None
) -> None:
    processor = reference.video_processor(model_type, VIDEO_CONFIGS[model_type])
    for source_fps in (1.0, 5.0, 10.0, 23.976, 25.0, 29.97, 30.0, 60.0):
        for num_frames in [*range(2, 120), 239, 240, 241, 1000, 1799, 7001, 30011]:
            metadata = VideoMetadata(total_num_frames=num_frames, fps=source_fps)
            expected = processor.sample_frames(metadata, fps=video_fps or 2).tolist()
            # Where float32 rounding takes the reference past the last frame it would fail to read it.
            expected = [min(index, num_frames - 1) for index in expected]
            indices = sample_frames(family_settings, num_frames, source_fps, MediaOptions(fps=video_fps))
            assert indices == expected, (num_frames, source_fps)

            metadata.frames_indices = indices
            expected_times = Qwen3VLProcessor._calculate_timestamps(None, list(indices), source_fps, 2)
            assert list(timestamps_s(indices, source_fps, 2)) == expected_times
            assert second_per_grid_t(len(indices), num_frames, source_fps, 2) == 2 / metadata.sampled_fps


def test_one_frame_and_every_frame(family_settings: ProcessorSettings) -> None:
    assert sample_frames(family_settings, 1, 30.0) == [0]
    assert sample_frames(family_settings, 4, 0.01, MediaOptions(fps=1e308)) == [0, 1, 2, 3]
    unsampled = ProcessorSettings(**{**vars(family_settings), "video_fps": 0.0})
    assert sample_frames(unsampled, 5, 30.0) == [0, 1, 2, 3, 4]
    assert timestamps_s([0, 1, 2], 2.0, 2) == (0.25, 1.0)
    assert len(sample_frames(unsampled, 5, 30.0, MediaOptions(num_frames=2))) == 2
    for needs_a_rate in (MediaOptions(sampled=True), MediaOptions(min_frames=2), MediaOptions(max_frames=2)):
        with pytest.raises(MediaError, match="names no rate"):
            sample_frames(unsampled, 5, 30.0, needs_a_rate)
