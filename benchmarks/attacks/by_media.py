"""Attacks by pictures and videos that are small and cost much."""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import av
import numpy as np
from PIL import Image

from benchmarks.attacks.over_http import CHAT, chat_body, data_url, picture_parts
from benchmarks.attacks.target import Target, keep_posting
from tests.encoder_service.decoding import hostile

_MIB = 1024 * 1024
_SIDE = 8192
_SALT_NBYTES = 8


def _posting(
    target: Target, make_parts: Callable[[str], list[dict[str, Any]]], file: bytes, kind: str, in_flight: int
) -> Callable[[], Awaitable[None]]:
    """Keeps this file in flight, each time with other bytes behind its end: what is decoded is found in no cache."""

    def make_body() -> bytes:
        return chat_body(target, make_parts(data_url(file + os.urandom(_SALT_NBYTES), kind)))

    return partial(keep_posting, target, CHAT, make_body, in_flight, None)


def _picture(target: Target, file: bytes, kind: str, in_flight: int = 2) -> Callable[[], Awaitable[None]]:
    return _posting(target, picture_parts, file, kind, in_flight)


def scans(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with a progressive JPEG of as many scans as are accepted: 16 over 67 million pixels."""
    return _picture(target, hostile.scans(_SIDE, _SIDE, 16), "image/jpeg")


def many_scans(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with a progressive JPEG of 40,000 scans."""
    return _picture(target, hostile.scans(_SIDE, _SIDE, 40_000), "image/jpeg")


def segments(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with 60 MiB of JPEG segments."""
    return _picture(target, hostile.segments(60 * _MIB // 4), "image/jpeg")


def chunks(target: Target) -> Callable[[], Awaitable[None]]:
    """Two clients with 60 MiB of PNG chunks."""
    return _picture(target, hostile.png_of_chunks(b"tEXt", 60 * _MIB // 12), "image/png")


def pixels(target: Target) -> Callable[[], Awaitable[None]]:
    """Four clients with a PNG of 67 million pixels."""
    file = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (200, 100, 50)).save(file, "PNG", compress_level=1)
    return _picture(target, file.getvalue(), "image/png", 4)


def video(target: Target) -> Callable[[], Awaitable[None]]:
    """Four clients with a video of 600 frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", 30)
        stream.width = stream.height = 640
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((640, 640, 3), 128, np.uint8), "rgb24")
        for _ in range(600):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    free = (8 + _SALT_NBYTES).to_bytes(4, "big") + b"free"  # a box whose content is skipped
    parts = lambda url: [{"type": "video_url", "video_url": {"url": url}}]  # noqa: E731
    return _posting(target, parts, file.getvalue() + free, "video/mp4", 4)
