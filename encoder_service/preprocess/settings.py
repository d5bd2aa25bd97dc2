"""How a checkpoint wants its images and videos prepared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from embedding_transport.checkpoint import Checkpoint, CheckpointError

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_RESCALE_FACTOR = 1 / 255
_BICUBIC = 3

# Class attributes of transformers 5.23's processors, which stand where a checkpoint's file leaves a field out.
_IMAGE_DEFAULTS: dict[str, Any] = {  # Qwen2VLImageProcessor, used by both families
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_QWEN3_VIDEO_DEFAULTS: dict[str, Any] = {  # Qwen3VLVideoProcessor
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "fps": 2,
    "do_sample_frames": True,
}
_QWEN2_VIDEO_DEFAULTS: dict[str, Any] = {  # Qwen2VLVideoProcessor
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "patch_size": 14,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    # The class names no rate and does not sample: every frame would be fed. Qwen's own utilities sample at 2 a second.
    "fps": 2,
    "do_sample_frames": True,
}
_VIDEO_DEFAULTS = {
    "qwen3_vl": _QWEN3_VIDEO_DEFAULTS,
    "qwen3_vl_moe": _QWEN3_VIDEO_DEFAULTS,
    "qwen2_5_vl": _QWEN2_VIDEO_DEFAULTS,
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_frames": 4,
    "max_frames": 768,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": _RESCALE_FACTOR,
    "resample": _BICUBIC,
}


@dataclass(frozen=True)
class ProcessorSettings:
    """Everything that decides an item's grid and pixels, besides the item.

    model_type: "qwen3_vl", "qwen3_vl_moe" or "qwen2_5_vl"; picks the frame sampling and the video resizing.
    patch_size: side of a patch, pixels; temporal_patch_size: frames in one; merge_size: patches merged along each side.
    min_pixels, max_pixels: bounds of an image's area after resizing.
    video_min_pixels, video_max_pixels: bounds of a video's volume after resizing (qwen2_5_vl: of one frame's area).
    video_fps: frames sampled per second of video; 0 takes every frame.
    video_min_frames, video_max_frames: bounds of the number of sampled frames.
    image_mean, image_std: per channel (R, G, B), of pixels scaled to 0..1.
    """

    model_type: str
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    video_fps: float
    video_min_frames: int
    video_max_frames: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.model_type not in _VIDEO_DEFAULTS:
            raise ValueError(f"model_type {self.model_type!r} is not one of {', '.join(_VIDEO_DEFAULTS)}")
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "video_min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("video_min_frames", "video_max_frames"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is larger than {high} {getattr(self, high)}")
        if self.video_fps < 0 or self.video_min_frames < 1:
            raise ValueError(f"video_fps is {self.video_fps} and video_min_frames {self.video_min_frames}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(f"image_mean {self.image_mean}, image_std {self.image_std}: need 3 numbers each, std > 0")

    @property
    def factor(self) -> int:
        """Side of the square that becomes one token, pixels: resized sides are multiples of it."""
        return self.patch_size * self.merge_size

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every field: part of the key of a cached embedding."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ProcessorSettings:
        """Reads the checkpoint's processor files the way transformers 5.23 does.

        An image processor is read from `image_processor` in processor_config.json, else from preprocessor_config.json;
        a video processor from `video_processor` there, else from video_preprocessor_config.json, else from
        preprocessor_config.json (so that Qwen2.5-VL's released checkpoints, which have no video file, bound a video's
        frame as they bound an image).

        Raises:
            CheckpointError: a file is missing, or asks for something this encoder does not do, naming the field.
        """
        model_type = str(checkpoint.config["model_type"])
        if model_type not in _VIDEO_DEFAULTS:
            raise CheckpointError(f"model_type {model_type!r} is not one of {', '.join(_VIDEO_DEFAULTS)}")
        nested = checkpoint.json("processor_config.json")
        image_file = nested.get("image_processor") or checkpoint.json("preprocessor_config.json")
        video_file = (
            nested.get("video_processor")
            or checkpoint.json("video_preprocessor_config.json")
            or checkpoint.json("preprocessor_config.json")
        )
        if not image_file or not video_file:
            raise CheckpointError(f"{checkpoint.folder} has no preprocessor_config.json: get it from the model's page")
        image = _COMMON_DEFAULTS | _IMAGE_DEFAULTS | image_file
        video = _COMMON_DEFAULTS | _VIDEO_DEFAULTS[model_type] | video_file
        if video["fps"] is None:
            video["fps"] = _VIDEO_DEFAULTS[model_type]["fps"]
        _refuse_unsupported(image, video)
        min_pixels, max_pixels = _pixel_bounds(image)
        # Qwen3VLVideoProcessor does not know the older spelling.
        video_min_pixels, video_max_pixels = _pixel_bounds(video, old_spelling=model_type == "qwen2_5_vl")
        try:
            return cls(
                model_type=model_type,
                patch_size=image["patch_size"],
                temporal_patch_size=image["temporal_patch_size"],
                merge_size=image["merge_size"],
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                video_min_pixels=video_min_pixels,
                video_max_pixels=video_max_pixels,
                video_fps=float(video["fps"]) if video["do_sample_frames"] else 0.0,
                video_min_frames=video["min_frames"],
                video_max_frames=video["max_frames"],
                image_mean=tuple(image["image_mean"]),
                image_std=tuple(image["image_std"]),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the processor files in {checkpoint.folder} do not add up: {error}") from error


def _pixel_bounds(file: dict[str, Any], *, old_spelling: bool = True) -> tuple[int, int]:
    """Smallest and largest area: `min_pixels`/`max_pixels` where given, else `size`."""
    size = file["size"] or {}
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if old_spelling:
        low = file.get("min_pixels") or low
        high = file.get("max_pixels") or high
    if not low or not high:
        raise CheckpointError(f"size is {size}: needs shortest_edge and longest_edge, or min_pixels and max_pixels")
    return int(low), int(high)


def _refuse_unsupported(image: dict[str, Any], video: dict[str, Any]) -> None:
    for file in (image, video):
        for name in ("do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor"):
            if file[name] != _COMMON_DEFAULTS[name]:
                raise CheckpointError(f"{name} is {file[name]!r}: only {_COMMON_DEFAULTS[name]!r} is supported")
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        if image[name] != video[name]:
            raise CheckpointError(f"{name} is {image[name]} for images and {video[name]} for videos: must be the same")
    for name in ("num_frames", "cap_pixels_per_frame"):
        if video.get(name):
            raise CheckpointError(f"{name} is {video[name]!r} for videos: not supported, remove it")
