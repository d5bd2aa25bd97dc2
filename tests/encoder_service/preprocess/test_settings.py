"""Settings against the attributes of transformers' processors built from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from tests.encoder_service.preprocess import reference
from tests.encoder_service.preprocess.samples import OMNI_IMAGE, QWEN3_IMAGE, QWEN3_VIDEO, QWEN25_IMAGE, settings
from vitrine_vlm.encoder_service.families import processor_settings
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

SIZE = {"shortest_edge": 5000, "longest_edge": 90_000}
QWEN25_BARE = {name: value for name, value in QWEN25_IMAGE.items() if name not in ("min_pixels", "max_pixels")}


@pytest.mark.parametrize(
    ("model_type", "image", "video"),
    [
        ("qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO),
        ("qwen3_vl_moe", QWEN3_IMAGE, QWEN3_VIDEO),
        ("qwen3_vl", QWEN3_IMAGE, None),
        ("qwen3_vl", QWEN3_IMAGE, {"fps": 4, "min_frames": 8, "max_frames": 32}),
        ("qwen3_vl", QWEN3_IMAGE, {"min_pixels": 4000, "max_pixels": 8000}),  # a spelling that this class does not read
        ("qwen3_5", QWEN3_IMAGE, QWEN3_VIDEO),
        ("qwen3_5_moe", QWEN3_IMAGE, {"fps": 1, "max_frames": 16}),
        ("qwen4_exp", QWEN3_IMAGE, None),
        ("qwen2_5_vl", QWEN25_IMAGE, None),
        ("qwen2_5_vl", QWEN25_IMAGE, {}),
        ("qwen2_5_vl", QWEN25_BARE, {"size": SIZE}),
        ("qwen2_5_vl", QWEN25_BARE | {"size": SIZE, "max_pixels": 70_000}, {"max_pixels": 800_000}),
        ("qwen2_5_vl", {"do_resize": True}, None),
    ],
)
def test_fields_and_defaults_equal_transformers(
    tmp_path: Path, model_type: str, image: dict[str, Any], video: dict[str, Any] | None
) -> None:
    found = settings(tmp_path, model_type, image, video)
    images = reference.image_processor(image)
    # Without a file for videos (an empty one counts as none), transformers reads the one for images.
    videos = reference.video_processor(model_type, video or image)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        assert getattr(found, name) == getattr(images, name) == getattr(videos, name)
    assert (found.min_pixels, found.max_pixels) == (images.size["shortest_edge"], images.size["longest_edge"])
    assert (found.video_min_pixels, found.video_max_pixels) == (
        videos.size["shortest_edge"],
        videos.size["longest_edge"],
    )
    assert list(found.image_mean) == list(images.image_mean) == list(videos.image_mean)
    assert list(found.image_std) == list(images.image_std) == list(videos.image_std)
    assert (found.video_min_frames, found.video_max_frames) == (videos.min_frames, videos.max_frames)
    assert found.video_fps == (videos.fps or 2)


@pytest.mark.parametrize("video", [None, QWEN3_VIDEO, {"min_pixels": 4000, "max_pixels": 8000}])
def test_omni_videos_have_the_bounds_of_its_processor(tmp_path: Path, video: dict[str, Any] | None) -> None:
    """Qwen3OmniMoeProcessor itself cannot be built without torchvision; its class attributes can be read."""
    found = settings(tmp_path, "qwen3_omni_moe", OMNI_IMAGE, video and QWEN3_IMAGE | video)
    size = Qwen3OmniMoeProcessor.videos_kwargs["size"]
    assert (found.video_min_pixels, found.video_max_pixels) == (size["shortest_edge"], size["longest_edge"])
    assert (found.min_pixels, found.max_pixels) == (3136, 12845056)
    assert (found.frame_sampling, found.video_bounds, found.video_fps) == ("grouped", "frame", 2.0)


def test_saved_by_transformers(tmp_path: Path) -> None:
    """Files with every field spelt out, as save_pretrained writes them, mean the same."""
    reference.image_processor(QWEN3_IMAGE).save_pretrained(tmp_path)
    reference.video_processor("qwen3_vl", QWEN3_VIDEO).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    saved = processor_settings(Checkpoint(tmp_path, "model", "revision"))
    (tmp_path / "plain").mkdir()
    assert saved == settings(tmp_path / "plain", "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO)


def test_nested_file_comes_first(tmp_path: Path) -> None:
    nested = {"image_processor": QWEN3_IMAGE, "video_processor": QWEN3_VIDEO | {"fps": 1}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = settings(tmp_path, "qwen3_vl", QWEN25_IMAGE, QWEN25_IMAGE)
    assert found.patch_size == 16 and found.video_fps == 1.0 and found.video_max_pixels == 25165824


def test_a_checkpoint_that_does_not_sample_gets_every_frame(tmp_path: Path) -> None:
    assert settings(tmp_path, "qwen2_5_vl", QWEN25_IMAGE, QWEN25_IMAGE | {"do_sample_frames": False}).video_fps == 0


@pytest.mark.parametrize(
    ("image", "video", "message"),
    [
        (QWEN3_IMAGE | {"do_resize": False}, QWEN3_VIDEO, "do_resize is False"),
        (QWEN3_IMAGE | {"resample": 2}, QWEN3_VIDEO, "resample is 2"),
        (QWEN3_IMAGE, QWEN3_VIDEO | {"patch_size": 14}, "patch_size is 16 for images and 14 for videos"),
        (QWEN3_IMAGE, QWEN3_VIDEO | {"num_frames": 8}, "num_frames"),
        (QWEN3_IMAGE, QWEN3_VIDEO | {"cap_pixels_per_frame": True}, "cap_pixels_per_frame"),
        (QWEN3_IMAGE | {"size": {"height": 3, "width": 3}}, QWEN3_VIDEO, "shortest_edge"),
        (QWEN3_IMAGE | {"size": {"shortest_edge": 9, "longest_edge": 3}}, QWEN3_VIDEO, "larger than"),
        ({}, {}, "no preprocessor_config.json"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, image: dict[str, Any], video: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        settings(tmp_path, "qwen3_vl", image, video)


def test_unknown_model_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'llava' has no vision tower"):
        settings(tmp_path, "llava", QWEN3_IMAGE)


def test_different_settings_have_different_fingerprints(tmp_path: Path) -> None:
    found = settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO)
    other = settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO | {"fps": 3})
    assert found.fingerprint() == settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO).fingerprint()
    assert found.fingerprint() != other.fingerprint()
