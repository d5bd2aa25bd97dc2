"""Bounds the chunks of a PNG."""

from __future__ import annotations

import struct

from vitrine_vlm.errors import MediaTooLarge

# A file of 64 MiB whose pixels come in chunks of 4 KiB has as many; libpng writes 8 KiB.
_MAX_CHUNKS = 16_384
# Besides those of pixels. Pillow inflates up to 1 MiB of each text, and 64 MiB in all.
_MAX_METADATA_CHUNKS = 1024
_FIRST_CHUNK = 8
_CHUNK_HEADER = struct.Struct(">I4s")
_PIXELS = (b"IDAT", b"fdAT", b"fcTL")


def check_png(data: bytes) -> None:
    """Follows the chunks of a PNG to its end.

    Raises:
        MediaTooLarge: too many chunks.
    """
    position, num_chunks, num_metadata = _FIRST_CHUNK, 0, 0
    while position + 8 <= len(data):
        length, kind = _CHUNK_HEADER.unpack_from(data, position)
        num_chunks += 1
        num_metadata += kind not in _PIXELS
        if num_chunks > _MAX_CHUNKS or num_metadata > _MAX_METADATA_CHUNKS:
            raise MediaTooLarge(
                f"a PNG of more than {_MAX_CHUNKS} chunks, or {_MAX_METADATA_CHUNKS} besides those of pixels: save it "
                "without metadata, in larger chunks"
            )
        if kind == b"IEND":
            return
        position += 12 + length
