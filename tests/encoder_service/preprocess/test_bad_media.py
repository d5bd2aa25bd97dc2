"""Media that must be refused, each with the error that says why, and without needless decoding."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.encoder_service.preprocess.samples import QWEN25_IMAGE, encode, photo, png, settings, video
from vitrine_vlm.encoder_service.decoding.file_length import is_truncated
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.errors import (
    BadAspectRatio,
    MediaError,
    MediaTooLarge,
    MediaTruncated,
    NotAnImage,
    NotAVideo,
)
from vitrine_vlm.types import MediaOptions

LIMITS = MediaLimits(max_pixels=1_000_000, max_frames=50)


@pytest.fixture
def preprocessor(tmp_path: Path) -> Preprocessor:
    return Preprocessor(settings(tmp_path, "qwen2_5_vl", QWEN25_IMAGE | {"max_pixels": 200_000}), LIMITS)


def _header_only_png(width: int, height: int, *behind: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(b"")), *behind, (b"IEND", b"")])


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<html>404</html>" * 50, b"\x89PNG\r\n\x1a\n" + bytes(50), b"P6 2 2 255\n" + bytes(12),
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", _header_only_png(0, 0)],
    ids=["empty", "text", "html", "png signature", "format not on the list", "postscript", "0x0"],
)  # fmt: skip
def test_not_an_image(preprocessor: Preprocessor, data: bytes) -> None:
    with pytest.raises(NotAnImage):
        preprocessor.open("image", data)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("HEIC", _box(b"ftyp", b"heic\0\0\0\0mif1heic") + _box(b"meta", bytes(40)) + _box(b"mdat", bytes(100))),
        ("JPEG 2000", encode(photo(64, 48), "JPEG2000")),
        ("JPEG 2000", b"\xff\x4f\xff\x51" + bytes(100)),
        ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100)),
        ("PDF", b"%PDF-1.7\n" + bytes(100)),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
    ],
    ids=["heic", "jp2", "j2k", "jxl", "pdf", "svg", "svg behind a prolog"],
)
def test_a_format_that_is_not_read_is_named(preprocessor: Preprocessor, name: str, data: bytes) -> None:
    with pytest.raises(NotAnImage, match=f"a {name} file.*send one of JPEG, PNG"):
        preprocessor.open("image", data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_truncated_image(preprocessor: Preprocessor, image_format: str) -> None:
    data = encode(photo(200, 150), image_format)
    for share in (0.5, 0.9):
        with pytest.raises(MediaTruncated, match="bytes"):
            preprocessor.open("image", data[: int(len(data) * share)]).patches()


def test_bomb_is_refused_from_its_header(preprocessor: Preprocessor) -> None:
    with pytest.raises(MediaTooLarge, match="60000x60000 pixels: at most 1000000"):
        preprocessor.open("image", _header_only_png(60000, 60000))
    with pytest.raises(MediaTooLarge, match="1001x1000"):
        preprocessor.open("image", encode(Image.new("1", (1001, 1000))))
    preprocessor.open("image", encode(Image.new("1", (1000, 1000))))


def test_bomb_is_refused_before_its_pixels_are_decoded_for_the_exif_behind_them(preprocessor: Preprocessor) -> None:
    with pytest.raises(MediaTooLarge, match="1001x1000"):  # has no pixels: decoding would fail otherwise
        preprocessor.open("image", _header_only_png(1001, 1000, (b"eXIf", b"")))


def test_aspect_ratio_is_refused_before_decoding(preprocessor: Preprocessor) -> None:
    with pytest.raises(BadAspectRatio, match="ratio is 201"):
        preprocessor.open("image", _header_only_png(201, 1))  # has no pixels: decoding would fail otherwise


def test_opening_reads_only_the_header(preprocessor: Preprocessor) -> None:
    opened = preprocessor.open("image", _header_only_png(56, 56))
    assert opened.layout.grid_thw == (1, 4, 4)
    with pytest.raises(MediaError):
        opened.patches()


def test_pixels_without_a_range(preprocessor: Preprocessor) -> None:
    floats = Image.fromarray(np.zeros((56, 56), dtype=np.float32))
    with pytest.raises(NotAnImage, match="32 bits"):
        preprocessor.open("image", encode(floats, "TIFF")).patches()


@pytest.mark.parametrize(
    "data",
    [b"", b"hello" * 100, encode(photo(64, 48)), b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
     b"ffconcat version 1.0\nfile /etc/passwd\n"],
    ids=["empty", "text", "image", "playlist", "concat list"],
)  # fmt: skip
def test_not_a_video(preprocessor: Preprocessor, data: bytes) -> None:
    with pytest.raises(NotAVideo):
        preprocessor.open("video", data)


def test_unknown_codec(preprocessor: Preprocessor) -> None:
    with pytest.raises(NotAVideo, match="codec"):
        preprocessor.open("video", video(5).replace(b"avc1", b"zzzz"))


@pytest.mark.parametrize(
    ("container", "codec", "pixel_format"),
    [("mp4", "libx264", "yuv420p"), ("webm", "libvpx", "yuv420p"), ("avi", "mjpeg", "yuvj420p")],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_video(
    preprocessor: Preprocessor, container: str, codec: str, pixel_format: str, share: float
) -> None:
    data = video(30, container=container, codec=codec, pixel_format=pixel_format)
    with pytest.raises(MediaTruncated):
        preprocessor.open("video", data[: int(len(data) * share)]).patches()


@pytest.mark.parametrize("junk", [b"\xff" * 40, b"\0" * 40, b"\0\0\1\0\xfe\xdc\xba\x98" + b"\1" * 40])
def test_a_whole_video_with_something_behind_it(preprocessor: Preprocessor, junk: bytes) -> None:
    data = video(8)
    assert torch.equal(preprocessor.open("video", data + junk).patches(), preprocessor.open("video", data).patches())


def test_a_file_of_nothing_but_boxes_is_given_up_soon() -> None:
    boxes = b"\0\0\0\x18ftypisom" + bytes(12) + b"\0\0\0\x08free" * (2 << 20)
    start = time.process_time()
    assert not is_truncated(boxes)
    assert time.process_time() - start < 0.5


def test_damaged_video(preprocessor: Preprocessor) -> None:
    data = bytearray(video(30))
    start = data.index(b"mdat") + 4
    data[start + 4 : start + 1500] = bytes(1496)
    with pytest.raises(MediaTruncated, match="damaged"):
        preprocessor.open("video", bytes(data)).patches()


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_video_with_too_many_frames(preprocessor: Preprocessor, container: str, codec: str) -> None:
    with pytest.raises(MediaTooLarge, match="frames"):
        preprocessor.open("video", video(51, container=container, codec=codec))
    assert preprocessor.open("video", video(50, container=container, codec=codec)).layout.grid_thw[0] == 5


def test_video_with_too_many_pixels(preprocessor: Preprocessor, tmp_path: Path) -> None:
    with pytest.raises(MediaTooLarge, match="1280x800"):
        preprocessor.open("video", video(2, width=1280, height=800))
    small = Preprocessor(preprocessor.settings, MediaLimits(max_video_pixels=4 * 56 * 56))
    with pytest.raises(MediaTooLarge, match="lower video_fps"):
        small.open("video", video(30, width=84, height=84))


@pytest.mark.parametrize("video_fps", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_video_fps(preprocessor: Preprocessor, video_fps: float) -> None:
    with pytest.raises(MediaError, match="video_fps"):
        preprocessor.open("video", video(5), MediaOptions(fps=video_fps))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_random_damage_never_raises_anything_else(preprocessor: Preprocessor, kind: str) -> None:
    rng = random.Random(0)
    if kind == "image":
        files = [encode(photo(40, 30), image_format) for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    else:
        files = [video(8), video(8, container="webm", codec="libvpx")]
    for data in files:
        for _ in range(60):
            damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            for _ in range(rng.choice((1, 3, 10))):
                if damaged:
                    damaged[rng.randrange(min(len(damaged), 500))] = rng.randrange(256)
            with contextlib.suppress(MediaError):
                preprocessor.open(kind, bytes(damaged)).patches()  # type: ignore[arg-type]
