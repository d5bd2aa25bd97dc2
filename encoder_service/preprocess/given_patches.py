"""Patches that a caller has cut already: checked against their grid, then copied to the device and normalized there.

Shapes: P = t * h * w patches, D = 3 * temporal_patch_size * patch_size ** 2 values in each.
"""

from __future__ import annotations

import math

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.encoder_service.decoding.media_decoder import MediaDecoder
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.gpu_work import GpuWork
from vitrine_vlm.encoder_service.preprocess.patchify import normalize
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.errors import MediaError, MediaTooLarge
from vitrine_vlm.types import Layout, MediaKind, Patches

PATCH_DTYPES: dict[str, torch.dtype] = {"uint8": torch.uint8, **DTYPES}


class GivenPatches:
    """An `OpenedMedia` whose pixels are cut already.

    Args:
        patches: checked here, before memory is allocated for them.

    Raises:
        MediaError: dtype, grid, number of bytes or times do not agree.
        MediaTooLarge: more pixels than media may have.
    """

    decodes_on_gpu = False
    decode_work = None

    def __init__(
        self, kind: MediaKind, patches: Patches, settings: ProcessorSettings, limits: MediaLimits, work: GpuWork
    ) -> None:
        self._patches = patches
        self._settings = settings
        self._work = work
        _check_dtype(patches)
        _check_grid(kind, patches.grid_thw, settings, limits)
        _check_nbytes(patches, settings)
        t, h, w = patches.grid_thw
        self.layout = Layout(
            kind,
            patches.grid_thw,
            t * (h // settings.merge_size) * (w // settings.merge_size),
            _timestamps_s(kind, patches, settings.temporal_patch_size),
            patches.second_per_grid_t,
        )

    def patches(self, decoder: MediaDecoder | None = None) -> torch.Tensor:
        """See `OpenedMedia.patches`; nothing is decoded."""
        work, num_patches = self._work, math.prod(self._patches.grid_thw)
        with work():
            # A copy: what follows writes in place, and the bytes are needed again where a ticket is claimed again.
            values = torch.frombuffer(bytearray(self._patches.data), dtype=PATCH_DTYPES[self._patches.dtype])
            patches_PD = values.view(num_patches, -1).to(work.device)
            return self._normalized(patches_PD).to(work.dtype)

    def _normalized(self, patches_PD: torch.Tensor) -> torch.Tensor:
        """Normalized patches, finite and bounded.

        Items of a batch share kernels, whose masks may multiply a neighbour's values by 0: NaN or infinity, which
        huge values become inside of the tower, would pass from one item into another.
        """
        if patches_PD.dtype == torch.uint8:
            return normalize(patches_PD, self._settings)
        # Normalized, no pixel is beyond 1 / std.
        bound = 1 / min(self._settings.image_std)
        low, high = (-bound, bound) if self._patches.normalized else (0.0, 255.0)
        patches_PD.nan_to_num_(nan=0.0, posinf=high, neginf=low).clamp_(low, high)
        return patches_PD if self._patches.normalized else normalize(patches_PD, self._settings)


def _check_dtype(patches: Patches) -> None:
    if patches.dtype not in PATCH_DTYPES:
        raise MediaError(f"patches of dtype {patches.dtype[:40]!r}: accepted are {', '.join(PATCH_DTYPES)}")
    if patches.normalized and patches.dtype == "uint8":
        raise MediaError("patches of dtype uint8 that are normalized: uint8 holds pixels, say that they are not")


def _check_grid(
    kind: MediaKind, grid_thw: tuple[int, int, int], settings: ProcessorSettings, limits: MediaLimits
) -> None:
    t, h, w = grid_thw
    merge, patch = settings.merge_size, settings.patch_size
    if min(grid_thw) < 1 or h % merge or w % merge:
        raise MediaError(f"patches with grid {grid_thw}: t must be at least 1, h and w positive multiples of {merge}")
    if kind == "image" and t != 1:
        raise MediaError(f"patches of an image with grid {grid_thw}: t must be 1, send several frames as a video")
    frame_pixels = h * w * patch**2
    num_pixels = t * settings.temporal_patch_size * frame_pixels
    if frame_pixels > limits.max_pixels:
        raise MediaTooLarge(
            f"patches with grid {grid_thw}, {w * patch}x{h * patch} pixels: at most {limits.max_pixels} are accepted, "
            "scale it down"
        )
    if kind == "video" and num_pixels > limits.max_video_pixels:
        raise MediaTooLarge(
            f"patches of a video with grid {grid_thw}, {num_pixels} pixels in all: at most {limits.max_video_pixels} "
            "are accepted, send fewer or smaller frames"
        )


def _check_nbytes(patches: Patches, settings: ProcessorSettings) -> None:
    num_patches = math.prod(patches.grid_thw)
    width = 3 * settings.temporal_patch_size * settings.patch_size**2
    nbytes = num_patches * width * PATCH_DTYPES[patches.dtype].itemsize
    if len(patches.data) != nbytes:
        raise MediaError(
            f"{len(patches.data)} bytes of patches with grid {patches.grid_thw} and dtype {patches.dtype}: "
            f"{num_patches} patches of {width} values are {nbytes} bytes"
        )


def _timestamps_s(kind: MediaKind, patches: Patches, temporal_patch_size: int) -> tuple[float, ...]:
    """The times of a video's temporal patches, from the interval between them where they are not given.

    Raises:
        MediaError: a video without times, another number of times, or times of an image.
    """
    times, interval_s, grid_t = patches.timestamps_s, patches.second_per_grid_t, patches.grid_thw[0]
    if not all(math.isfinite(time) and time >= 0 for time in (*times, interval_s)):
        raise MediaError("patches with times that are not finite or negative: give seconds from the video's start")
    if kind == "image":
        if times or interval_s:
            raise MediaError(f"patches of an image with {len(times)} timestamps and {interval_s} s: images have none")
        return ()
    if not times and interval_s:
        # The mean of the first and the last frame's time, as in `frame_sampling.timestamps_s`.
        first_s = interval_s * (temporal_patch_size - 1) / (2 * temporal_patch_size)
        return tuple(first_s + interval_s * index for index in range(grid_t))
    if len(times) != grid_t:
        raise MediaError(
            f"patches of a video with grid {patches.grid_thw}, {len(times)} timestamps and {interval_s} s between "
            f"them: give {grid_t} timestamps, or none and second_per_grid_t"
        )
    return times
