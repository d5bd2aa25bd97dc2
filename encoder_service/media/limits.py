"""Limits on the media that an encoder accepts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True)
class MediaLimits:
    """Bounds on one media item, all checked before the work they bound is done.

    max_bytes: bytes in the encoded file.
    max_pixels: width x height of an image, or of one video frame, as stored (before resizing); after resizing, too,
        where its size follows from bounds of the request.
    max_frames: frames in a video, sampled or not.
    max_video_pixels: width x height x sampled frames of a video, after resizing.
    timeout_s: longest download, redirects included; connect_timeout_s: longest time to open one TCP connection.
    max_redirects: redirects followed for one URL; every hop is checked like the first.
    allowed_folder: file: URLs may name files below it; None refuses file: URLs.
    allow_private_addresses: lets URLs lead to private and loopback addresses.
    """

    max_bytes: int = 64 * MIB
    max_pixels: int = 64 * MIB
    max_frames: int = 200_000
    max_video_pixels: int = 128 * MIB
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    max_redirects: int = 5
    allowed_folder: Path | None = None
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_frames", "max_video_pixels", "timeout_s", "connect_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects is {self.max_redirects}, must not be negative")
        if self.allowed_folder is not None and not self.allowed_folder.is_dir():
            raise ValueError(f"allowed_folder {self.allowed_folder} is not a folder")
