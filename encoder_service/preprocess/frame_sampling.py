"""Chooses the frames of a video that are encoded, and computes their times.

Source: transformers 5.23, `sample_frames` and `_calculate_timestamps` of the processors that the families name;
`VideoMetadata.sampled_fps` of video_utils.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.errors import MediaError
from vitrine_vlm.types import NO_OPTIONS, MediaOptions


def frame_range(num_source_frames: int, source_fps: float, options: MediaOptions = NO_OPTIONS) -> range:
    """Indices of the frames in the part of the video that is looked at: all where the options name no part.

    Source: qwen-vl-utils 0.0.14, `calculate_video_frame_range` of vision_process.py.

    Raises:
        MediaError: fewer than two frames lie in it.
    """
    if options.start_s is None and options.end_s is None:
        return range(num_source_frames)
    duration_s = num_source_frames / source_fps
    first = math.ceil(min(options.start_s or 0.0, duration_s) * source_fps)
    last = num_source_frames - 1
    if options.end_s is not None:
        last = min(math.floor(min(options.end_s, duration_s) * source_fps), last)
    if first >= last:
        end_s = duration_s if options.end_s is None else options.end_s
        raise MediaError(
            f"from {options.start_s or 0.0:g} s to {end_s:g} s the video has no two frames: it has "
            f"{num_source_frames}, {source_fps:g} a second"
        )
    return range(first, last + 1)


def sample_frames(
    settings: ProcessorSettings, num_source_frames: int, source_fps: float, options: MediaOptions = NO_OPTIONS
) -> list[int]:
    """Indices of the frames to encode, ascending; with repetitions where more are asked for than there are.

    Of a video with fewer frames than one temporal patch, which transformers refuses, all frames are encoded; so are all
    of a video with fewer frames than `num_frames` where sampling is "grouped", which is refused there, too.

    Args:
        num_source_frames: frames in the video, at least 1; source_fps: its rate, frames per second.
        options: how many to sample, where that is not as the settings say. `min_frames` and `max_frames` count as if
            they were the settings'.

    Raises:
        MediaError: frames are to be sampled without a rate, which neither the options nor the settings have.
    """
    if options.num_frames is not None:
        return _sample_number(settings, num_source_frames, options.num_frames)
    fps = 0.0 if options.sampled is False else options.fps or settings.video_fps
    if fps == 0 and (options.sampled or options.min_frames or options.max_frames):
        raise MediaError("this checkpoint takes every frame and names no rate: give video_fps or num_frames, too")
    if fps == 0 or num_source_frames < settings.temporal_patch_size:
        return list(range(num_source_frames))
    low = options.min_frames or settings.video_min_frames
    high = options.max_frames or settings.video_max_frames
    if settings.frame_sampling == "even":
        # Rounded down last, as a huge rate makes the number infinite.
        num_frames = int(min(max(num_source_frames / source_fps * fps, low), high, num_source_frames))
        return _spread(num_source_frames, num_frames)
    group = settings.temporal_patch_size
    high = math.floor(min(high, num_source_frames) / group) * group
    wanted = min(max(num_source_frames / source_fps * fps, low), high, num_source_frames)
    return _in_groups(num_source_frames, max(group, math.floor(wanted / group) * group))


def _sample_number(settings: ProcessorSettings, num_source_frames: int, num_frames: int) -> list[int]:
    if settings.frame_sampling == "even":
        return _spread(num_source_frames, num_frames)
    group = settings.temporal_patch_size
    num_frames = max(group, round(num_frames / group) * group)
    if num_frames > num_source_frames:
        return list(range(num_source_frames))
    return _in_groups(num_source_frames, num_frames)


def _spread(num_source_frames: int, num_frames: int) -> list[int]:
    indices: list[int] = np.linspace(0, num_source_frames - 1, num_frames).round().astype(int).tolist()
    return indices


def _in_groups(num_source_frames: int, num_frames: int) -> list[int]:
    # float32 rounding of torch.arange is part of the reference; it may round the last index up to the end.
    steps = torch.arange(0, num_source_frames, num_source_frames / num_frames).int()
    return [min(index, num_source_frames - 1) for index in steps.tolist()]


def timestamps_s(indices: list[int], source_fps: float, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds from the start of each temporal patch: the mean of its first and last frame's time."""
    padded = indices + indices[-1:] * (-len(indices) % temporal_patch_size)
    times = [index / source_fps for index in padded]
    first_times, last_times = times[::temporal_patch_size], times[temporal_patch_size - 1 :: temporal_patch_size]
    return tuple((first + last) / 2 for first, last in zip(first_times, last_times, strict=True))


def second_per_grid_t(num_frames: int, num_source_frames: int, source_fps: float, temporal_patch_size: int) -> float:
    """Seconds between temporal patches: `temporal_patch_size` over the rate at which frames were really sampled.

    Args:
        num_frames: frames sampled of the `num_source_frames` that are looked at.
    """
    sampled_fps = num_frames / num_source_frames * source_fps
    return temporal_patch_size / sampled_fps
