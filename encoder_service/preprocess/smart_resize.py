"""Computes the size that media is resized to: multiples of `factor`, within the pixel bounds, near the aspect ratio.

Source: transformers 5.23, `smart_resize` beside the image and video processors that the families name, without
`cap_pixels_per_frame`.
"""

from __future__ import annotations

import math

from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.errors import BadAspectRatio
from vitrine_vlm.types import NO_OPTIONS, MediaOptions

MAX_ASPECT_RATIO = 200


def resized_image_size(
    settings: ProcessorSettings, height: int, width: int, options: MediaOptions = NO_OPTIONS
) -> tuple[int, int]:
    """(height, width) of an image after resizing, pixels.

    Args:
        options: their bounds replace the settings'. As in transformers, an image above the upper bound is made smaller
            even where that bound is below the lower one.

    Raises:
        BadAspectRatio: one side is more than 200 times the other.
    """
    low, high = options.min_pixels or settings.min_pixels, options.max_pixels or settings.max_pixels
    return _fit(1, height, width, settings.factor, low, high)


def resized_video_size(
    settings: ProcessorSettings, num_frames: int, height: int, width: int, options: MediaOptions = NO_OPTIONS
) -> tuple[int, int]:
    """(height, width) of every frame of a video with `num_frames` sampled frames after resizing, pixels.

    Args:
        options: as in `resized_image_size`.

    Raises:
        BadAspectRatio: one side is more than 200 times the other.
    """
    low, high = options.min_pixels or settings.video_min_pixels, options.max_pixels or settings.video_max_pixels
    factor = settings.factor
    if settings.video_bounds == "frame":
        return _fit(1, height, width, factor, low, high)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return _fit(num_frames, height, width, factor, low, high, settings.temporal_patch_size)


def _fit(
    num_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int, temporal_factor: int = 1
) -> tuple[int, int]:
    """Fits num_frames x height x width into the bounds.

    The volume that is compared with the bounds has sides rounded to multiples, the volume that is scaled has not.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise BadAspectRatio(
            f"{width}x{height} pixels: the aspect ratio is {ratio:.1f}, at most {MAX_ASPECT_RATIO} is accepted, crop it"
        )
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    volume = round(num_frames / temporal_factor) * temporal_factor * resized_height * resized_width
    if volume > max_pixels:
        shrink = math.sqrt((num_frames * height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width
