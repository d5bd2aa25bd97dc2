"""Bounds what stands in a GIF in front of its first frame, the only one that is decoded as a picture."""

from __future__ import annotations

from vitrine_vlm.errors import MediaTooLarge

# XMP is read as blocks of about 70 bytes.
_MAX_BLOCKS = 65_536
_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_HEADER_NBYTES = 13


def check_gif(data: bytes) -> None:
    """Follows the blocks of a GIF to its first frame.

    Raises:
        MediaTooLarge: too many blocks in front of it.
    """
    flags = data[10] if len(data) > 10 else 0
    position = _HEADER_NBYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    num_blocks = 0
    while position < len(data) and data[position] not in (_IMAGE, _TRAILER):
        if data[position] == _EXTENSION:
            position += 2
            while position < len(data) and data[position] and num_blocks <= _MAX_BLOCKS:
                position += 1 + data[position]
                num_blocks += 1
        # The end of an extension, or a byte that belongs to nothing, over which Pillow goes, too.
        position += 1
        num_blocks += 1
        if num_blocks > _MAX_BLOCKS:
            raise MediaTooLarge(
                f"a GIF with more than {_MAX_BLOCKS} blocks in front of its first frame: save it without metadata"
            )
