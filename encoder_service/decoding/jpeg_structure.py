"""Bounds the segments and scans of a JPEG."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vitrine_vlm.errors import MediaTooLarge

# A large colour profile or XMP takes up to 255 segments, and each scan may bring tables.
_MAX_SEGMENTS = 2048
# Progressive JPEGs have about 10 scans (libjpeg-turbo's and mozjpeg's defaults). Each costs a pass over all pixels.
_MAX_SCANS = 100
# Passes over the pixels of the largest picture that is accepted: all of a large one's usual scans, but not a hundred.
_MAX_FULL_PASSES = 16
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_STANDALONE = (_SOI, _EOI, _TEM, *range(0xD0, 0xD8))
_SEQUENTIAL, _OTHER_FRAMES = (0xC0, 0xC1), (0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
# 0xFF 0x00 and the restart markers are part of a scan's data.
_MARKER_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


@dataclass
class JpegStructure:
    """What the segments so far have said.

    num_scans: the scans; is_sequential: whether all frames are sequential with Huffman coding.
    """

    num_scans: int = 0
    is_sequential: bool = True
    num_components: int = 0
    num_pixels: int = 0

    def read_segment(self, code: int, content: bytes) -> None:
        """Takes in a segment by the first bytes behind its length."""
        if code in _SEQUENTIAL or code in _OTHER_FRAMES:
            self.is_sequential = self.is_sequential and code in _SEQUENTIAL
            num_pixels = int.from_bytes(content[1:3], "big") * int.from_bytes(content[3:5], "big")
            self.num_pixels = max(self.num_pixels, num_pixels)
            self.num_components = content[5] if len(content) > 5 else 0
        elif code == _SOS:
            self.num_scans += 1


def check_jpeg(data: bytes, max_pixels: int) -> JpegStructure:
    """Follows the segments of a JPEG to its end.

    Raises:
        MediaTooLarge: too many segments or scans, or scans over too many pixels.
    """
    structure = JpegStructure()
    num_segments, position = 0, 2
    while (found := _next_marker(data, position, structure.num_scans)) >= 0:
        code = data[found + 1] if found + 1 < len(data) else _EOI
        # In front of the first scan Pillow goes over what stands between segments byte by byte.
        num_segments += 1 if structure.num_scans else 1 + found - position
        if num_segments > _MAX_SEGMENTS:
            raise MediaTooLarge(
                f"a JPEG of more than {_MAX_SEGMENTS} segments, or bytes between them: save it without metadata"
            )
        if code == _EOI and structure.num_scans:
            break
        position = found + (1 if code == 0xFF else 2)
        if code in (0, 0xFF) or code in _STANDALONE:
            continue
        structure.read_segment(code, data[position + 2 : position + 8])
        if code == _SOS:
            _check_scans(structure, max_pixels)
            num_components = data[position + 2] if position + 2 < len(data) else 0
            if num_components == structure.num_components and is_last_scan(data, position):
                break
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    else:
        if not structure.num_scans and len(data) - position > _MAX_SEGMENTS:
            raise MediaTooLarge(f"a JPEG with {len(data) - position} bytes without a picture: send the picture alone")
    return structure


def _next_marker(data: bytes, start: int, num_scans: int) -> int:
    """Where a marker begins; -1 where there is none."""
    if not num_scans:
        return data.find(b"\xff", start)
    match = _MARKER_BEHIND_SCAN.search(data, start)
    return match.start() if match else -1


def is_last_scan(data: bytes, start: int) -> bool:
    """Whether no marker of a scan follows, which takes a tenth of the time of looking for any marker."""
    marker = int.from_bytes(bytes((0xFF, _SOS)), "little")
    pairs = (np.frombuffer(data, "<u2", (len(data) - at) // 2, at) for at in (start, start + 1) if len(data) - at > 1)
    return not any((each == marker).any() for each in pairs)


def _check_scans(structure: JpegStructure, max_pixels: int) -> None:
    if structure.num_scans > _MAX_SCANS:
        raise MediaTooLarge(f"a JPEG of more than {_MAX_SCANS} scans: save it as a baseline JPEG")
    if structure.num_scans * structure.num_pixels > _MAX_FULL_PASSES * max_pixels:
        raise MediaTooLarge(
            f"a JPEG of {structure.num_scans} scans or more over {structure.num_pixels} pixels: at most "
            f"{_MAX_FULL_PASSES * max_pixels} pixels in all scans are accepted, save it as a baseline JPEG or scale it "
            "down"
        )
