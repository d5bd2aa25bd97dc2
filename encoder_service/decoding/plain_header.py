"""Reads the headers of the plainest JPEGs and PNGs without a library, in the encoder's own process.

A picture of a few KiB costs a decoder's process more for being sent there and back than for its header. What is read
here takes a bounded number of steps over a file of bounded length, and no memory. All else is left to the decoder: what
is damaged, what has metadata (which may turn the picture, and can be made to take gigabytes), several scans or frames,
or anything that is not known to be harmless.
"""

from __future__ import annotations

import struct

from vitrine_vlm.encoder_service.decoding.jpeg_structure import is_last_scan
from vitrine_vlm.encoder_service.decoding.media_decoder import ImageHeader, InProcessDecoder
from vitrine_vlm.encoder_service.media.limits import MediaLimits

# Larger ones cost more to decode than to send. The step that looks at all of the bytes takes 0.2 ms for 1 MiB.
MAX_NBYTES = 1024 * 1024
_MAX_PARTS = 256
_SOI, _SOS = b"\xff\xd8", 0xDA
_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential, Huffman coding
# Tables, restart interval, comment, JFIF, Adobe's colours.
_HARMLESS = (0xDB, 0xC4, 0xDD, 0xFE, 0xE0, 0xEE)
_COLOUR_PROFILE, _PROFILE_START = 0xE2, b"ICC_PROFILE\0"

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_SIZE = struct.Struct(">IIBBBBB")
_PNG_PARTS = struct.Struct(">I4s")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_HARMLESS = (b"IDAT", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"tIME")


class NotPlain(Exception):
    """A decoder has to read the header."""


class PlainHeaders(InProcessDecoder):
    """Opens the pictures whose headers are read here, and nothing else."""

    def open_image(self, data: bytes, limits: MediaLimits) -> ImageHeader:
        """
        Raises:
            NotPlain: see `plain_header`.
        """
        if (header := plain_header(data, limits.max_pixels)) is None:
            raise NotPlain
        return header


def plain_header(data: bytes, max_pixels: int) -> ImageHeader | None:
    """The header of a picture of at most `max_pixels`; None where a decoder has to read it, or refuse the file."""
    header = None
    if len(data) <= MAX_NBYTES:
        if data.startswith(_SOI):
            header = _jpeg_header(data)
        elif data.startswith(_PNG_START):
            header = _png_header(data)
    return header if header and 0 < header.height * header.width <= max_pixels else None


def _jpeg_header(data: bytes) -> ImageHeader | None:
    """Follows the segments, which must adjoin, to the only scan."""
    position, frame = 2, b""
    for _ in range(_MAX_PARTS):
        if position + 4 > len(data) or data[position] != 0xFF:
            return None
        code, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        content = data[position + 4 : position + 2 + length]
        if length < 2 or len(content) != length - 2:
            return None
        position += 2 + length
        if code == _SOS:
            is_only_scan = frame and content[:1] == frame[5:6] and is_last_scan(data, position)
            return _jpeg_header_of(frame) if is_only_scan else None
        if code in _FRAMES and not frame and len(content) >= 6:
            frame = content
        elif code not in _HARMLESS and not (code == _COLOUR_PROFILE and content.startswith(_PROFILE_START)):
            return None
    return None


def _jpeg_header_of(frame: bytes) -> ImageHeader | None:
    """The header that a frame's segment states, of 8 bits in colour or grey."""
    num_components = frame[5]
    if frame[0] != 8 or num_components not in (1, 3) or len(frame) != 6 + 3 * num_components:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    return ImageHeader(height, width, orientation=1, format="JPEG", num_passes=1, is_plain_jpeg=True)


def _png_header(data: bytes) -> ImageHeader | None:
    """Follows the chunks to the end."""
    position = len(_PNG_START) + _PNG_SIZE.size + 4
    if position > len(data):
        return None
    width, height, depth, colour, compression, filtering, interlace = _PNG_SIZE.unpack_from(data, len(_PNG_START))
    if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        return None
    for _ in range(_MAX_PARTS):
        if position + 12 > len(data):
            return None
        length, kind = _PNG_PARTS.unpack_from(data, position)
        if kind == b"IEND":
            return ImageHeader(height, width, orientation=1, format="PNG", num_passes=1, is_plain_jpeg=False)
        if kind not in _PNG_HARMLESS:
            return None
        position += 12 + length
    return None
