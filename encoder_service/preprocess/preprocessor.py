"""Turns encoded media into patches: the layout first, the pixels on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from vitrine_vlm.encoder_service.decoding.media_decoder import InProcessDecoder, MediaDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.encoded_image import EncodedImage, decode_on_gpu
from vitrine_vlm.encoder_service.preprocess.encoded_video import EncodedFrames, EncodedVideo, OpenedVideo
from vitrine_vlm.encoder_service.preprocess.frame_sampling import (
    frame_range,
    sample_frames,
    second_per_grid_t,
    timestamps_s,
)
from vitrine_vlm.encoder_service.preprocess.given_patches import GivenPatches
from vitrine_vlm.encoder_service.preprocess.gpu_work import GpuWork
from vitrine_vlm.encoder_service.preprocess.option_checks import check_options
from vitrine_vlm.encoder_service.preprocess.patchify import patchify, resize
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.encoder_service.preprocess.smart_resize import resized_image_size, resized_video_size
from vitrine_vlm.errors import MediaTooLarge
from vitrine_vlm.types import NO_OPTIONS, Layout, MediaKind, MediaOptions, Patches

_CPU = torch.device("cpu")
_IN_PROCESS = InProcessDecoder()
# Of a temporal patch, measured on one core of a Xeon.
_PATCH_SECONDS_A_PIXEL = 20e-9
# Of a list of frames, where neither the caller nor the checkpoint names a rate.
_LISTED_FPS = 2.0


class OpenedMedia(Protocol):
    """One media item whose size is known and whose pixels are not decoded yet."""

    @property
    def layout(self) -> Layout:
        """Grid, tokens and video times; `content_hash` is empty."""
        ...

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether the GPU may decode it, by `Preprocessor.patches_of_batch`."""
        ...

    @property
    def decode_work(self) -> DecodeWork | None:
        """What `patches` takes; None where it needs no decoder."""
        ...

    def patches(self, decoder: MediaDecoder = _IN_PROCESS) -> torch.Tensor:
        """Decodes, resizes, normalizes and cuts into patches. Blocking; any thread may call it, and again.

        Args:
            decoder: what decodes; by default this thread, which suits trusted files only.

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

    def open(
        self,
        kind: MediaKind,
        data: bytes,
        options: MediaOptions = NO_OPTIONS,
        decoder: MediaDecoder = _IN_PROCESS,
    ) -> OpenedMedia:
        """Reads as much of `data` as the layout needs: an image's header; of a video the index and one frame.

        Blocking. Size, shape and frame count are checked here, before any memory for pixels is allocated.

        Args:
            data: the encoded file.
            decoder: see `OpenedMedia.patches`.

        Raises:
            NotAnImage, NotAVideo, MediaTruncated, MediaTooLarge, BadAspectRatio: see docs/media.md.
            MediaError: see `check_options`.
        """
        check_options(kind, options)
        if kind == "image":
            image = EncodedImage(data, self._limits, decoder)
            return _OpenedImage(self.settings, image, options, self._limits, self._work)
        video = EncodedVideo(data, self._limits, decoder)
        return _OpenedVideo(self.settings, video, options, self._limits, self._work)

    def open_frames(
        self, files: Sequence[bytes], options: MediaOptions = NO_OPTIONS, decoder: MediaDecoder = _IN_PROCESS
    ) -> OpenedMedia:
        """Reads the headers of a video's frames, none of which is left out; see `open`.

        Args:
            files: the encoded pictures.
            options: `fps` is the rate at which they were taken; where left out, the one at which others are sampled.
        """
        check_options("video", options, is_list=True)
        frames = EncodedFrames(files, self._limits, options.fps or self.settings.video_fps or _LISTED_FPS, decoder)
        return _OpenedVideo(self.settings, frames, replace(options, fps=None, sampled=False), self._limits, self._work)

    def open_patches(self, kind: MediaKind, patches: Patches) -> OpenedMedia:
        """Opens an item that the caller has cut into patches already; see `GivenPatches`.

        Raises:
            MediaError, MediaTooLarge: the patches do not agree with their grid, or are too many.
        """
        return GivenPatches(kind, patches, self.settings, self._limits, self._work)

    def patch_seconds(self, layout: Layout) -> float:
        """About how long resizing and cutting an item's pixels takes one core; next to nothing with a GPU."""
        num_pixels = math.prod(layout.grid_thw) * self.settings.patch_size**2
        return num_pixels * _PATCH_SECONDS_A_PIXEL if self._work.device.type == "cpu" else 0.0

    def patches_of_batch(self, opened: Sequence[OpenedMedia]) -> list[torch.Tensor | Exception]:
        """The patches of several items that may be decoded on the GPU, or the exception that each one raised.

        It is NotForGpu where the GPU cannot decode an item, whatever the reason: `patches` can, or says what is wrong.
        """
        try:
            return list(self._patches_by_gpu(opened))
        except NotForGpu:  # one of them is damaged: decoding one by one finds which
            return [_result(partial(self._patches_by_gpu, [each])) for each in opened]

    def _patches_by_gpu(self, opened: Sequence[OpenedMedia]) -> list[torch.Tensor]:
        images = [each for each in opened if isinstance(each, _OpenedImage) and each.decodes_on_gpu]
        if len(images) != len(opened):
            raise NotForGpu
        with self._work():
            try:
                decoded = decode_on_gpu([each.image for each in images], self._work.device)
            except RuntimeError as error:
                raise NotForGpu from error
            return [each.patches_of(pixels) for each, pixels in zip(images, decoded, strict=True)]


class NotForGpu(Exception):
    """The GPU cannot decode an item."""


class _OpenedImage:
    def __init__(
        self,
        settings: ProcessorSettings,
        image: EncodedImage,
        options: MediaOptions,
        limits: MediaLimits,
        work: GpuWork,
    ) -> None:
        self._settings = settings
        self._work = work
        self.image = image
        self._size = resized_image_size(settings, image.height, image.width, options)
        _check_resized("picture", *self._size, options, limits)
        grid_thw = _grid_thw(settings, 1, *self._size)
        self.layout = Layout("image", grid_thw, _num_tokens(settings, grid_thw))
        self.decodes_on_gpu = work.device.type == "cuda" and image.suits_nvjpeg
        self.decode_work = image.decode_work

    def patches(self, decoder: MediaDecoder = _IN_PROCESS) -> torch.Tensor:
        with self._work(), self.image.pixels(self._work.device, decoder) as pixels_CHW:
            return self.patches_of(pixels_CHW)

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
        video: OpenedVideo,
        options: MediaOptions,
        limits: MediaLimits,
        work: GpuWork,
    ) -> None:
        group = settings.temporal_patch_size
        self._settings = settings
        self._video = video
        self._work = work
        looked_at = frame_range(video.num_frames, video.fps, options)
        _check_number(settings, options, limits)
        sampled = sample_frames(settings, len(looked_at), video.fps, options)
        self._indices = [looked_at.start + index for index in sampled]
        # transformers refuses some videos shorter than one temporal patch; here they count as one.
        num_frames = max(group, len(self._indices))
        height, width = self._size = resized_video_size(settings, num_frames, video.height, video.width, options)
        _check_resized("video frame", height, width, options, limits)
        if num_frames * height * width > limits.max_video_pixels:
            raise MediaTooLarge(
                f"{num_frames} sampled frames of {width}x{height} pixels: at most {limits.max_video_pixels} pixels are "
                "accepted in all, ask for fewer frames (a lower video_fps, num_frames or max_pixels) or send a shorter "
                "video"
            )
        grid_thw = _grid_thw(settings, math.ceil(num_frames / group), height, width)
        self.layout = Layout(
            "video",
            grid_thw,
            _num_tokens(settings, grid_thw),
            timestamps_s(self._indices, video.fps, group),
            second_per_grid_t(len(self._indices), len(looked_at), video.fps, group),
        )
        self.decode_work = video.work(self._indices)

    def patches(self, decoder: MediaDecoder = _IN_PROCESS) -> torch.Tensor:
        # Each frame is resized as it leaves the decoder: full-size frames of a long video would not fit in memory.
        num_padded = self.layout.grid_thw[0] * self._settings.temporal_patch_size
        with self._work():
            frames_FCHW = torch.empty((num_padded, 3, *self._size), dtype=torch.uint8, device=self._work.device)
            for position, pixels_CHW in enumerate(self._video.frames(self._indices, decoder)):
                frames_FCHW[position] = resize(pixels_CHW.to(self._work.device), *self._size)
            # A partial patch repeats the last frame.
            frames_FCHW[len(self._indices) :] = frames_FCHW[len(self._indices) - 1]
            return patchify(frames_FCHW, self._settings)


def _check_resized(what: str, height: int, width: int, options: MediaOptions, limits: MediaLimits) -> None:
    """Bounds the size of an item whose caller has set it; sizes of the checkpoint's own are the operator's choice."""
    if (options.min_pixels or options.max_pixels) and height * width > limits.max_pixels:
        raise MediaTooLarge(
            f"a {what} that is resized to {width}x{height} pixels: at most {limits.max_pixels} are accepted, lower "
            "min_pixels and max_pixels"
        )


def _check_number(settings: ProcessorSettings, options: MediaOptions, limits: MediaLimits) -> None:
    """Bounds the number of frames before so many are listed: each will have one token at least."""
    most = limits.max_video_pixels // settings.factor**2
    if options.num_frames is not None and options.num_frames > most:
        raise MediaTooLarge(
            f"num_frames is {options.num_frames}: no more than {most} frames are within the limit of "
            f"{limits.max_video_pixels} pixels for a video"
        )


def _result(make: Callable[[], list[torch.Tensor]]) -> torch.Tensor | Exception:
    try:
        return make()[0]
    except Exception as error:
        return error


def _grid_thw(settings: ProcessorSettings, grid_t: int, height: int, width: int) -> tuple[int, int, int]:
    return grid_t, height // settings.patch_size, width // settings.patch_size


def _num_tokens(settings: ProcessorSettings, grid_thw: tuple[int, int, int]) -> int:
    return math.prod(grid_thw) // settings.merge_size**2
