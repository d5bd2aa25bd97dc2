"""Estimates what decoding an item takes, from its pixels, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitrine_vlm.encoder_service.decoding.media_decoder import ImageHeader, VideoHeader
from vitrine_vlm.types import MediaKind

# CPU time a pixel, seconds, measured on one core of a Xeon with pictures that compress as photographs do.
_SECONDS_A_PIXEL = {"JPEG": 8e-9, "PNG": 60e-9, "WEBP": 25e-9, "AVIF": 21e-9}
_OTHER_SECONDS_A_PIXEL = 20e-9
_SECONDS_A_PIXEL_AND_PASS = 1e-9
_SECONDS_A_VIDEO_PIXEL, _SECONDS_A_SAMPLED_PIXEL = 4e-9, 1e-9
# Passing a file on and looking over its bytes: its parts are bounded.
_SECONDS_A_BYTE = 4e-9
# A decoder's own picture in 4 bytes a pixel, and RGB; some have another copy, or the coefficients of all scans.
_NBYTES_A_PIXEL, _NBYTES_A_PIXEL_WITH_COPY = 7, 13
# Reference frames and those that threads decode, in 1.5 bytes a pixel, and two in RGB.
_NBYTES_A_VIDEO_PIXEL = 24
_FORMATS_WITH_COPY = ("WEBP", "AVIF")
# What a PNG of 5 million pixels takes, and a JPEG of 37 million.
_LIGHT_S, _LIGHT_NBYTES = 0.3, 256 * 1024**2


@dataclass(frozen=True)
class DecodeWork:
    """What one use of a decoder takes.

    seconds: of one core; nbytes: of memory at most.
    """

    kind: MediaKind
    seconds: float
    nbytes: int

    @property
    def is_light(self) -> bool:
        """Whether it holds a decoder so shortly, and so little memory, that others need no protection from it."""
        return self.seconds <= _LIGHT_S and self.nbytes <= _LIGHT_NBYTES


def opening_work(kind: MediaKind, files: Sequence[bytes]) -> DecodeWork:
    """Of reading headers. A video, of which frames may have to be decoded to count them, is never light."""
    nbytes = sum(map(len, files))
    seconds = nbytes * _SECONDS_A_BYTE + (2 * _LIGHT_S if kind == "video" and len(files) == 1 else 0.0)
    return DecodeWork(kind, seconds, 2 * max(map(len, files), default=0))


def image_work(header: ImageHeader, file_nbytes: int) -> DecodeWork:
    """Of an image's pixels."""
    num_pixels = header.height * header.width
    seconds_a_pixel = _SECONDS_A_PIXEL.get(header.format, _OTHER_SECONDS_A_PIXEL)
    seconds = num_pixels * (seconds_a_pixel + (header.num_passes - 1) * _SECONDS_A_PIXEL_AND_PASS)
    seconds += file_nbytes * _SECONDS_A_BYTE
    with_copy = header.num_passes > 1 or header.format in _FORMATS_WITH_COPY
    return DecodeWork("image", seconds, num_pixels * (_NBYTES_A_PIXEL_WITH_COPY if with_copy else _NBYTES_A_PIXEL))


def video_work(header: VideoHeader, num_decoded: int, num_sampled: int) -> DecodeWork:
    """Of a video's frames.

    Args:
        num_decoded: frames up to the last one that is sampled.
    """
    num_pixels = header.height * header.width
    seconds = num_pixels * (num_decoded * _SECONDS_A_VIDEO_PIXEL + num_sampled * _SECONDS_A_SAMPLED_PIXEL)
    return DecodeWork("video", seconds, num_pixels * _NBYTES_A_VIDEO_PIXEL)
