"""Turns encoded media into patches: the layout first, the pixels on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.frame_sampling import sample_frames, second_per_grid_t, timestamps_s
from vitrine_vlm.encoder_service.preprocess.given_patches import GivenPatches
from vitrine_vlm.encoder_service.preprocess.gpu_work import GpuWork
from vitrine_vlm.encoder_service.preprocess.image_decode import EncodedImage, decode_batch
from vitrine_vlm.encoder_service.preprocess.patchify import patchify, resize
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.encoder_service.preprocess.smart_resize import resized_image_size, resized_video_size
from vitrine_vlm.encoder_service.preprocess.video_decode import EncodedVideo
from vitrine_vlm.errors import MediaError, MediaTooLarge
from vitrine_vlm.types import Layout, MediaKind, Patches

_CPU = torch.device("cpu")


class OpenedMedia(Protocol):
    """One media item whose size is known and whose pixels are not decoded yet."""

    @property
    def layout(self) -> Layout:
        """Grid, tokens and video times; `content_hash` is empty."""
        ...

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether the GPU decodes it, so that `Preprocessor.patches_of_batch` is faster than `patches`."""
        ...

    def patches(self) -> torch.Tensor:
        """Decodes, resizes, normalizes and cuts into patches. Blocking; any thread may call it, and again.

        Returns:
            [num_patches, 3 * temporal_patch_size * patch_size ** 2], complete, on the preprocessor's device; float32,
            on a GPU of all but videos in the preprocessor's dtype. See `patchify` for the order.

        Raises:
            MediaTruncated, NotAnImage, NotAVideo: the pixels turn out to be damaged.
        """
        ...


class Preprocessor:
    """Prepares media for the vision tower. Thread-safe: several items may be opened and decoded at once."""

    def __init__(
        self,
        settings: ProcessorSettings,
        limits: MediaLimits,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            device: where pixels become patches; a GPU decodes JPEGs, too, if nvJPEG is installed.
            dtype: of an image's patches that a GPU computes.
        """
        self.settings = settings
        self._limits = limits
        self._work = GpuWork(device, settings, dtype)

    def open(self, kind: MediaKind, data: bytes, video_fps: float | None = None) -> OpenedMedia:
        """Reads as much of `data` as the layout needs: an image's header; of a video the index and one frame.

        Blocking. Size, shape and frame count are checked here, before any memory for pixels is allocated.

        Args:
            data: the encoded file.
            video_fps: video only: frames sampled per second instead of the checkpoint's rate.

        Raises:
            NotAnImage, NotAVideo, MediaTruncated, MediaTooLarge, BadAspectRatio: see docs/media.md.
            MediaError: `video_fps` is no positive number.
        """
        if kind == "image":
            return _OpenedImage(self.settings, EncodedImage(data, self._limits.max_pixels), self._work)
        if video_fps is not None and not (math.isfinite(video_fps) and video_fps > 0):
            raise MediaError(f"video_fps is {video_fps}: give a positive number, or none for the model's default")
        video = EncodedVideo(data, self._limits)
        return _OpenedVideo(self.settings, video, self._limits.max_video_pixels, video_fps, self._work)

    def open_patches(self, kind: MediaKind, patches: Patches) -> OpenedMedia:
        """Opens an item that the caller has cut into patches already; see `GivenPatches`.

        Raises:
            MediaError, MediaTooLarge: the patches do not agree with their grid, or are too many.
        """
        return GivenPatches(kind, patches, self.settings, self._limits, self._work)

    def patches_of_batch(self, opened: Sequence[OpenedMedia]) -> list[torch.Tensor | Exception]:
        """The patches of several items that a GPU decodes, or the exception that each one raised."""
        images = [each for each in opened if isinstance(each, _OpenedImage) and each.decodes_on_gpu]
        if len(images) == len(opened):
            with self._work():
                try:
                    decoded = decode_batch([each.image for each in images], self._work.device)
                    return [each.patches_of(pixels) for each, pixels in zip(images, decoded, strict=True)]
                except RuntimeError:
                    pass  # one of them is damaged: decoding one by one finds which
        return [_result(each.patches) for each in opened]


class _OpenedImage:
    def __init__(self, settings: ProcessorSettings, image: EncodedImage, work: GpuWork) -> None:
        self._settings = settings
        self._work = work
        self.image = image
        self._size = resized_image_size(settings, image.height, image.width)
        grid_thw = _grid_thw(settings, 1, *self._size)
        self.layout = Layout("image", grid_thw, _num_tokens(settings, grid_thw))
        self.decodes_on_gpu = work.device.type == "cuda" and image.suits_nvjpeg

    def patches(self) -> torch.Tensor:
        with self._work():
            return self.patches_of(self.image.decode(self._work.device))

    def patches_of(self, decoded_CHW: torch.Tensor) -> torch.Tensor:
        """Makes patches of pixels on the preprocessor's device; on a GPU the work is only launched."""
        if decoded_CHW.is_cuda:
            return self._work.image_patches(decoded_CHW, *self._size)
        pixels_CHW = resize(decoded_CHW, *self._size)
        return patchify(pixels_CHW.expand(self._settings.temporal_patch_size, -1, -1, -1), self._settings)


class _OpenedVideo:
    decodes_on_gpu = False

    def __init__(
        self,
        settings: ProcessorSettings,
        video: EncodedVideo,
        max_video_pixels: int,
        video_fps: float | None,
        work: GpuWork,
    ) -> None:
        group = settings.temporal_patch_size
        self._settings = settings
        self._video = video
        self._work = work
        self._indices = sample_frames(settings, video.num_frames, video.fps, video_fps)
        # transformers refuses some videos shorter than one temporal patch; here they count as one.
        num_frames = max(group, len(self._indices))
        height, width = self._size = resized_video_size(settings, num_frames, video.height, video.width)
        if num_frames * height * width > max_video_pixels:
            raise MediaTooLarge(
                f"{num_frames} sampled frames of {width}x{height} pixels: at most {max_video_pixels} pixels are "
                "accepted in all, ask for a lower video_fps or send a shorter video"
            )
        grid_thw = _grid_thw(settings, math.ceil(num_frames / group), height, width)
        self.layout = Layout(
            "video",
            grid_thw,
            _num_tokens(settings, grid_thw),
            timestamps_s(self._indices, video.fps, group),
            second_per_grid_t(len(self._indices), video.num_frames, video.fps, group),
        )

    def patches(self) -> torch.Tensor:
        # Each frame is resized as it leaves the decoder: full-size frames of a long video would not fit in memory.
        num_padded = self.layout.grid_thw[0] * self._settings.temporal_patch_size
        with self._work():
            frames_FCHW = torch.empty((num_padded, 3, *self._size), dtype=torch.uint8, device=self._work.device)
            for position, pixels_CHW in enumerate(self._video.frames(self._indices)):
                frames_FCHW[position] = resize(pixels_CHW.to(self._work.device), *self._size)
            # A partial patch repeats the last frame.
            frames_FCHW[len(self._indices) :] = frames_FCHW[len(self._indices) - 1]
            return patchify(frames_FCHW, self._settings)


def _result(make: Callable[[], torch.Tensor]) -> torch.Tensor | Exception:
    try:
        return make()
    except Exception as error:
        return error


def _grid_thw(settings: ProcessorSettings, grid_t: int, height: int, width: int) -> tuple[int, int, int]:
    return grid_t, height // settings.patch_size, width // settings.patch_size


def _num_tokens(settings: ProcessorSettings, grid_thw: tuple[int, int, int]) -> int:
    return math.prod(grid_thw) // settings.merge_size**2
