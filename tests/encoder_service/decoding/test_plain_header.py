"""Headers that are read without a library equal Pillow's, and all that is not plain is left to a decoder."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests.encoder_service.decoding import hostile
from tests.encoder_service.preprocess.samples import encode, photo
from vitrine_vlm.encoder_service.decoding.image_decode import open_image
from vitrine_vlm.encoder_service.decoding.plain_header import MAX_NBYTES, plain_header
from vitrine_vlm.errors import MediaError

MAX_PIXELS = 1 << 20
PICTURE = photo(97, 64)
COLOUR_PROFILE = bytes(70_000)  # of two segments
EXIF = Image.Exif()
EXIF[274] = 6


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    return info


PLAIN = {
    "JPEG": encode(PICTURE, "JPEG", quality=90),
    "grey JPEG": encode(PICTURE.convert("L"), "JPEG"),
    "JPEG with colour profile": encode(PICTURE, "JPEG", icc_profile=COLOUR_PROFILE),
    "JPEG with comment": encode(PICTURE, "JPEG", comment=b"\xff\xda"),
    "PNG": encode(PICTURE, "PNG"),
    "PNG of a palette": encode(PICTURE.convert("P"), "PNG", transparency=0),
    "PNG of 16 bits": encode(PICTURE.convert("L").convert("I;16"), "PNG"),
}
OTHERS = {
    "progressive JPEG": encode(PICTURE, "JPEG", progressive=True),
    "CMYK": encode(PICTURE.convert("CMYK"), "JPEG"),
    "turned JPEG": encode(PICTURE, "JPEG", exif=EXIF),
    "turned PNG": encode(PICTURE, "PNG", exif=EXIF),
    "PNG turned by XMP": encode(PICTURE, "PNG", pnginfo=text()),
    "WebP": encode(PICTURE, "WEBP"),
    "scans": hostile.scans(64, 64, 3),
    "segments": hostile.segments(3000),
    "chunks": hostile.png_of_chunks(b"tIME", 300),
    "two frames": PLAIN["JPEG"][:2]
    + b"\xff\xc0\0\x0b"
    + struct.pack(">BHHB", 8, 9, 9, 1)
    + b"\1\x11\0"
    + PLAIN["JPEG"][2:],
    "a scan without a length": b"\xff\xd8\xff\xc0\0\x0b\x08\0\1\0\1\1\1\x11\0\xff\xda\0\2",
    "cut off": PLAIN["JPEG"][:200],
    "cut off PNG": PLAIN["PNG"][:-12],
    "long": PLAIN["JPEG"] + bytes(MAX_NBYTES),
    "nothing": b"",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_headers_are_pillows(name: str) -> None:
    header = plain_header(PLAIN[name], MAX_PIXELS)
    assert header is not None
    assert header == open_image(PLAIN[name], MAX_PIXELS)
    assert plain_header(PLAIN[name], 97 * 64 - 1) is None


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_a_decoder(name: str) -> None:
    assert plain_header(OTHERS[name], MAX_PIXELS) is None


@settings(max_examples=300)
@given(st.sampled_from(sorted(PLAIN)), st.integers(0, 700), st.integers(0, 4), st.binary(max_size=4))
def test_changed_files_are_read_alike(name: str, start: int, num_bytes: int, piece: bytes) -> None:
    data = PLAIN[name][:start] + piece + PLAIN[name][start + num_bytes :]
    header = plain_header(data, MAX_PIXELS)
    with suppress(MediaError):  # a decoder says so when it decodes
        assert header in (None, open_image(data, MAX_PIXELS))


@pytest.mark.parametrize("name", PLAIN)
def test_files_that_end_anywhere_are_left_to_a_decoder(name: str) -> None:
    # The last chunk of a PNG is recognized by its name; a JPEG's end stands only in its scan.
    assert {plain_header(PLAIN[name][:length], MAX_PIXELS) for length in range(300)} == {None}
