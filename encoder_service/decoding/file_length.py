"""The length that a file's headers declare, which distinguishes a truncated file from one of another format."""

from __future__ import annotations

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
# An hour of video in fragments of 0.1 s has 72,000.
_MAX_BOXES = 200_000
_EBML_ID, _SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def is_truncated(data: bytes) -> bool:
    """Whether a file is shorter than its headers declare.

    It reads RIFF (WebP, AVI), ISO media (MP4, MOV, AVIF) and Matroska (WebM), and is False for every other format.
    """
    # One byte of slack: some writers leave out the last padding byte.
    return _declared_nbytes(data) > len(data) + 1


def _declared_nbytes(data: bytes) -> int:
    """Bytes that the file's outermost headers declare; 0 where they declare none."""
    if data[:4] == b"RIFF" and len(data) >= 12:
        return 8 + int.from_bytes(data[4:8], "little")
    if data[4:8] in _ISO_BOXES:
        return _end_of_iso_boxes(data)
    if data[:4] == _EBML_ID:
        segment = _end_of_ebml_element(data, 0)
        return _end_of_ebml_element(data, segment) if data[segment : segment + 4] == _SEGMENT_ID else 0
    return 0


def _end_of_iso_boxes(data: bytes) -> int:
    """The end of the last box whose header is in the file; 0 where it is not known."""
    offset = 0
    for _ in range(_MAX_BOXES):
        if len(data) - offset < 16:
            return offset
        if not data[offset + 4 : offset + 8].isascii():
            return 0  # something else behind the last box
        nbytes = int.from_bytes(data[offset : offset + 4], "big")
        if nbytes == 1:  # a 64-bit size follows
            nbytes = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if nbytes < 8:  # 0: the box runs to the end of the file; others are not valid
            return 0
        offset += nbytes
    return 0


def _end_of_ebml_element(data: bytes, start: int) -> int:
    """The end of the element at `start`, whose id has 4 bytes; 0 where its size is not known."""
    first = data[start + 4] if len(data) > start + 4 else 0
    width = 9 - first.bit_length()  # leading zero bits of the first byte count the bytes of the size
    if width > 8:
        return 0
    content = start + 4 + width
    nbytes = int.from_bytes(data[start + 4 : content], "big") & ((1 << 7 * width) - 1)
    return 0 if nbytes == (1 << 7 * width) - 1 else content + nbytes
