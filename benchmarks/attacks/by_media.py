"""Attacks by pictures and videos that are small and cost much."""

from __future__ import annotations

import base64
import io
from collections.abc import Awaitable, Callable

import av
import numpy as np
from PIL import Image

from benchmarks.attacks.over_http import chat_body, picture_parts, posting
from benchmarks.attacks.target import Target
from tests.encoder_service.decoding import hostile

_MIB = 1024 * 1024
_SIDE = 8192


def _picture(target: Target, file: bytes, kind: str, in_flight: int = 2) -> Callable[[], Awaitable[None]]:
    url = f"data:{kind};base64,{base64.b64encode(file).decode()}"
    return posting(target, chat_body(target, picture_parts(url)), in_flight)


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
    url = f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}"
    return posting(target, chat_body(target, [{"type": "video_url", "video_url": {"url": url}}]), 4)
