"""Files that are small and cost a decoder much, or would without bounds."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def jpeg(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A JPEG of smooth colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", progressive=progressive)
    return file.getvalue()


def scans(width: int, height: int, num_scans: int) -> bytes:
    """A progressive JPEG with scans that hold nothing: 10 bytes each, and a pass over all pixels."""
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    tables = _segment(0xDB, bytes((0, *[1] * 64))) + _segment(0xC4, bytes((0, 1, *[0] * 15, 0)))
    tables += _segment(0xC4, bytes((0x10, 1, *[0] * 15, 0)))
    dc = _segment(0xDA, b"\1\1\0\0\0\0")
    ac = _segment(0xDA, b"\1\1\0\1\x3f\0")
    return b"\xff\xd8" + tables + _segment(0xC2, frame) + dc + ac * (num_scans - 1) + b"\xff\xd9"


def _segment(code: int, content: bytes) -> bytes:
    return bytes((0xFF, code)) + struct.pack(">H", 2 + len(content)) + content


def segments(num_segments: int) -> bytes:
    """A JPEG that begins with so many empty segments."""
    return b"\xff\xd8" + b"\xff\xe5\0\2" * num_segments + jpeg(32, 32)[2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_chunks(kind: bytes, num_chunks: int) -> bytes:
    """A PNG of 8x8 pixels with so many empty chunks in front of its pixels."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(8 * 25))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(kind) * num_chunks + chunk(b"IDAT", pixels) + chunk(b"IEND")
