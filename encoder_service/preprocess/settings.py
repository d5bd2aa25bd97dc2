"""How images and videos are prepared for a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

_BICUBIC = 3
_RESCALE_FACTOR = 1 / 255
# Values of transformers' processors of all families where a checkpoint's file leaves a field out.
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
FrameSampling = Literal["even", "grouped"]
VideoBounds = Literal["volume", "frame"]


@dataclass(frozen=True)
class ProcessorDefaults:
    """How a family's processors prepare media unless a checkpoint's files say otherwise.

    image, video: values of fields that the image or the video processor's file leaves out, by their names there.
    frame_sampling: see `frame_sampling.sample_frames`; video_bounds: see `smart_resize.resized_video_size`.
    video_pixels_old_spelling: the video processor reads `min_pixels` and `max_pixels`, too.
    video_fixed: fields of the video processor that a file cannot change.
    """

    image: Mapping[str, Any]
    video: Mapping[str, Any]
    frame_sampling: FrameSampling
    video_bounds: VideoBounds
    video_pixels_old_spelling: bool
    video_fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessorSettings:
    """Everything besides the item itself that decides its grid and pixels.

    frame_sampling: "even" spreads any number of frames over the video, "grouped" takes whole temporal patches.
    video_bounds: whether the bounds on pixels are for a video's "volume" or for each "frame".
    patch_size: side of a patch, pixels; temporal_patch_size: frames in one; merge_size: patches merged along each side.
    min_pixels, max_pixels: bounds of an image's area after resizing.
    video_min_pixels, video_max_pixels: bounds of a video's volume, or of one frame's area, after resizing.
    video_fps: frames sampled per second of video; 0 takes every frame.
    video_min_frames, video_max_frames: bounds of the number of sampled frames.
    image_mean, image_std: per channel (R, G, B), of pixels scaled to 0..1.
    """

    frame_sampling: FrameSampling
    video_bounds: VideoBounds
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
    def from_checkpoint(cls, checkpoint: Checkpoint, defaults: ProcessorDefaults) -> ProcessorSettings:
        """Reads the checkpoint's processor files the way transformers 5.23 does.

        An image processor is read from `image_processor` in processor_config.json, else from preprocessor_config.json;
        a video processor from `video_processor` there, else from video_preprocessor_config.json, else from
        preprocessor_config.json (so that released checkpoints that have no video file bound a video's frame as they
        bound an image).

        Args:
            defaults: those of the checkpoint's family.

        Raises:
            CheckpointError: a file is missing, or a field of it, which is named, has a value that is not supported.
        """
        nested = checkpoint.json("processor_config.json")
        image_file = nested.get("image_processor") or checkpoint.json("preprocessor_config.json")
        video_file = (
            nested.get("video_processor")
            or checkpoint.json("video_preprocessor_config.json")
            or checkpoint.json("preprocessor_config.json")
        )
        if not image_file or not video_file:
            raise CheckpointError(f"{checkpoint.folder} has no preprocessor_config.json: get it from the model's page")
        image = {**_COMMON_DEFAULTS, **defaults.image, **image_file}
        video = {**_COMMON_DEFAULTS, **defaults.video, **video_file, **defaults.video_fixed}
        if video["fps"] is None:
            video["fps"] = defaults.video["fps"]
        _refuse_unsupported(image, video)
        min_pixels, max_pixels = _pixel_bounds(image)
        video_min_pixels, video_max_pixels = _pixel_bounds(video, old_spelling=defaults.video_pixels_old_spelling)
        try:
            return cls(
                frame_sampling=defaults.frame_sampling,
                video_bounds=defaults.video_bounds,
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
