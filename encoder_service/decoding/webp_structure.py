"""Bounds the chunks and the canvas of a WebP."""

from __future__ import annotations

import struct

from vitrine_vlm.errors import MediaTooLarge

# Of an animation each frame is one.
_MAX_CHUNKS = 16_384
_FIRST_CHUNK = 12
_CHUNK_HEADER = struct.Struct("<4sI")


def check_webp(data: bytes, max_pixels: int) -> None:
    """Follows the chunks of a WebP to its end. Pillow allocates two canvases when it opens the file.

    Raises:
        MediaTooLarge: too many chunks or pixels.
    """
    position = _FIRST_CHUNK
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = _CHUNK_HEADER.unpack_from(data, position)
        width, height = _size(kind, data[position + 8 : position + 18])
        if width * height > max_pixels:
            raise MediaTooLarge(
                f"an image of {width}x{height} pixels: at most {max_pixels} are accepted, scale it down"
            )
        position += 8 + length + length % 2
    raise MediaTooLarge(f"a WebP of more than {_MAX_CHUNKS} chunks: send its first frame alone")


def _size(kind: bytes, content: bytes) -> tuple[int, int]:
    """(width, height) by a chunk's first 10 bytes; (0, 0) where it declares none.

    Source: RFC 9649, sections 2.5 to 2.7 (a frame's header in VP8 is of RFC 6386, section 9.1).
    """
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if kind == b"VP8 ":
        return (
            int.from_bytes(content[6:8], "little") & 0x3FFF,
            int.from_bytes(content[8:10], "little") & 0x3FFF,
        )
    if kind == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 0, 0
