"""How a picture's file is built: what real ones have passes, what would cost a decoder much is refused soon."""

from __future__ import annotations

import struct
import time

import pytest
from PIL import features

from tests.encoder_service.decoding import hostile
from tests.encoder_service.preprocess.samples import encode, photo
from vitrine_vlm.encoder_service.decoding.jpeg_structure import check_jpeg
from vitrine_vlm.encoder_service.decoding.picture_structure import PictureStructure, check_structure
from vitrine_vlm.errors import MediaTooLarge

MAX_PIXELS = 64 << 20
MIB = 1 << 20


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_usual_pictures_pass(image_format: str) -> None:
    assert features.check("webp") and features.check("avif")
    assert check_structure(encode(photo(200, 150), image_format), MAX_PIXELS) == PictureStructure()


def test_the_scans_of_a_jpeg_are_counted() -> None:
    baseline, progressive = hostile.jpeg(320, 240), hostile.jpeg(320, 240, progressive=True)
    assert check_structure(baseline, MAX_PIXELS) == PictureStructure(1, is_baseline=True)
    assert check_structure(progressive, MAX_PIXELS) == PictureStructure(10)
    # What stands behind the end of the picture, such as a preview or a film, is none of it.
    assert check_structure(progressive + progressive, MAX_PIXELS) == PictureStructure(10)
    assert check_structure(hostile.scans(64, 64, 100), MAX_PIXELS) == PictureStructure(100)


def test_a_marker_inside_of_a_segment_hides_no_scans() -> None:
    comment = b"\xff\xfe\0\x04\xff\xd9"
    file = hostile.scans(64, 64, 3)
    first_scan = file.index(b"\xff\xda") + 10
    assert check_jpeg(file[:first_scan] + comment + file[first_scan:], MAX_PIXELS).num_scans == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile.scans(64, 64, 101), "more than 100 scans"),
        (hostile.scans(8192, 8192, 17), "17 scans or more over 67108864 pixels"),
        (hostile.segments(3000), "2048 segments"),
        (b"\xff\xd8" + b"\xff" * MIB, "2048 segments"),
        (b"\xff\xd8" + b"\xff\0" * MIB, "2048 segments"),
        (b"\xff\xd8" + b"\xff\xd9" * MIB, "2048 segments"),
        (b"\xff\xd8" + b"\xff\xe5\0\0" * MIB, "2048 segments"),
        (b"\xff\xd8" + b"a" * MIB, "without a picture"),
        (hostile.png_of_chunks(b"tEXt", 1100), "1024 besides"),
        (hostile.png_of_chunks(b"IDAT", 17_000), "16384 chunks"),
        (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 70_000 + b"\0", "65536 blocks"),
        (b"GIF89a" + bytes(7) + b"\0" * 70_000, "65536 blocks"),
        (b"RIFF\0\0\0\0WEBP" + b"junk\0\0\0\0" * 17_000, "16384 chunks"),
        (b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0\xff\x3f\0", "16384x16384 pixels"),
        (b"RIFF\0\0\0\0WEBPVP8L" + struct.pack("<I", 5) + b"\x2f\xff\xff\xff\xff", "16384x16384 pixels"),
        (b"II\x2a\0\x08\0\0\0" + struct.pack("<H", 65535) + bytes(12 * 1025), "1025 entries"),
        (
            b"MM\0\x2a\0\0\0\x08" + struct.pack(">HHHII", 1, 324, 4, 300_000, 26) + bytes(4 * 300_000),
            "300000 values in an entry",
        ),
    ],
)  # fmt: skip
def test_what_would_cost_much_is_refused_soon(data: bytes, message: str) -> None:
    start = time.process_time()
    with pytest.raises(MediaTooLarge, match=message):
        check_structure(data, MAX_PIXELS)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "start", [b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II\x2a\0", b"MM\0\x2b"]
)
@pytest.mark.parametrize(
    "end", [b"", b"\xff", b"\xff\xda", b"\xff\xc0\0", b"\xff\xda\0\2\xff", b"\xff" * 30, bytes(30)]
)
def test_a_damaged_file_is_left_to_the_decoder(start: bytes, end: bytes) -> None:
    check_structure(start + end, MAX_PIXELS)
