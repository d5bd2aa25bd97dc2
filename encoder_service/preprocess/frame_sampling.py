"""Chooses the frames of a video that are encoded, and computes their times.

Source: transformers 5.23, `sample_frames` and `_calculate_timestamps` of the processors that the families name;
`VideoMetadata.sampled_fps` of video_utils.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings


def sample_frames(
    settings: ProcessorSettings, num_source_frames: int, source_fps: float, video_fps: float | None = None
) -> list[int]:
    """Indices of the frames to encode, ascending.

    Of a video with fewer frames than one temporal patch, which transformers refuses, all frames are encoded.

    Args:
        num_source_frames: frames in the video, at least 1; source_fps: its rate, frames per second.
        video_fps: frames to sample per second instead of the settings' rate.
    """
    fps = video_fps if video_fps is not None else settings.video_fps
    if fps == 0 or num_source_frames < settings.temporal_patch_size:
        return list(range(num_source_frames))
    low, high = settings.video_min_frames, settings.video_max_frames
    if settings.frame_sampling == "even":
        # Rounded down last, as a huge rate makes the number infinite.
        num_frames = int(min(max(num_source_frames / source_fps * fps, low), high, num_source_frames))
        indices: list[int] = np.linspace(0, num_source_frames - 1, num_frames).round().astype(int).tolist()
        return indices
    group = settings.temporal_patch_size
    high = math.floor(min(high, num_source_frames) / group) * group
    wanted = min(max(num_source_frames / source_fps * fps, low), high, num_source_frames)
    num_frames = max(group, math.floor(wanted / group) * group)
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
    """Seconds between temporal patches: `temporal_patch_size` over the rate at which frames were really sampled."""
    sampled_fps = num_frames / num_source_frames * source_fps
    return temporal_patch_size / sampled_fps
