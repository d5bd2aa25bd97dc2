"""What decodes media: the interface, and the one that does it in the calling process.

Nothing here imports torch: a process that only decodes starts in a quarter of a second and takes 30 MiB without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vitrine_vlm.encoder_service.media.limits import MediaLimits

# [height, width, 3], uint8, upright.
Pixels: TypeAlias = npt.NDArray[np.uint8]
# Memory for [height, width, 3] pixels.
Allocate: TypeAlias = Callable[[int, int], Pixels]


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image without its pixels.

    height, width: upright, pixels.
    orientation: how EXIF turns the stored pixels, 1 (not at all) to 8.
    format: Pillow's name of it.
    num_passes: how often a decoder goes over the pixels; see `PictureStructure`.
    is_plain_jpeg: a baseline JPEG in colour or grey.
    """

    height: int
    width: int
    orientation: int
    format: str
    num_passes: int
    is_plain_jpeg: bool


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video without its frames.

    height, width: upright, pixels.
    fps: frames per second; num_frames: decoded ones.
    quarter_turns: counter-clockwise ones that turn the stored frames upright.
    """

    height: int
    width: int
    fps: float
    num_frames: int
    quarter_turns: int


class MediaDecoder(Protocol):
    """Decodes one file at a time. Blocking."""

    def open_image(self, data: bytes, limits: MediaLimits) -> ImageHeader:
        """See `image_decode.open_image`."""
        ...

    def image_pixels(self, data: bytes, header: ImageHeader) -> AbstractContextManager[Pixels]:
        """The pixels of an image, which are valid in the context only; see `image_decode.decode_image`."""
        ...

    def open_video(self, data: bytes, limits: MediaLimits) -> VideoHeader:
        """See `video_decode.open_video`."""
        ...

    def video_frames(
        self, data: bytes, header: VideoHeader, indices: Sequence[int], limits: MediaLimits
    ) -> Iterator[Pixels]:
        """These frames, each valid until the next one is asked for; see `video_decode.decode_video`."""
        ...


class InProcessDecoder:
    """Decodes in the calling process, where nothing can stop a file that takes long; safe on several threads."""

    def open_image(self, data: bytes, limits: MediaLimits) -> ImageHeader:
        from vitrine_vlm.encoder_service.decoding import image_decode

        return image_decode.open_image(data, limits.max_pixels)

    @contextmanager
    def image_pixels(self, data: bytes, header: ImageHeader) -> Iterator[Pixels]:
        from vitrine_vlm.encoder_service.decoding import image_decode

        yield image_decode.decode_image(data, header, lambda height, width: np.empty((height, width, 3), np.uint8))

    def open_video(self, data: bytes, limits: MediaLimits) -> VideoHeader:
        from vitrine_vlm.encoder_service.decoding import video_decode

        return video_decode.open_video(data, limits)

    def video_frames(
        self, data: bytes, header: VideoHeader, indices: Sequence[int], limits: MediaLimits
    ) -> Iterator[Pixels]:
        from vitrine_vlm.encoder_service.decoding import video_decode

        return video_decode.decode_video(data, header, indices, limits)
