"""Reads how a picture's file is built, and bounds what decoding it can cost, before a library sees it.

What is counted here is what decoders loop over: a file of a few KiB may hold millions of such parts, or have one pixel
computed a thousand times. The readers follow Pillow's in what they skip. They judge no file: a damaged one is left to
the decoder, which says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitrine_vlm.encoder_service.decoding.gif_structure import check_gif
from vitrine_vlm.encoder_service.decoding.jpeg_structure import check_jpeg
from vitrine_vlm.encoder_service.decoding.png_structure import check_png
from vitrine_vlm.encoder_service.decoding.tiff_structure import check_tiff
from vitrine_vlm.encoder_service.decoding.webp_structure import check_webp

_TIFF_STARTS = (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0", b"MM\0\x2b")


@dataclass(frozen=True)
class PictureStructure:
    """What decoding takes besides the pixels.

    num_passes: how often a decoder goes over the pixels: the scans of a JPEG, 1 for other formats.
    is_baseline: a JPEG of one scan, whose pixels are coded in order.
    """

    num_passes: int = 1
    is_baseline: bool = False


def check_structure(data: bytes, max_pixels: int) -> PictureStructure:
    """Checks the parts of a picture's file.

    Args:
        max_pixels: largest accepted width x height.

    Raises:
        MediaTooLarge: more scans, segments, chunks, blocks or metadata than a picture needs, or more pixels.
    """
    if data.startswith(b"\xff\xd8"):
        jpeg = check_jpeg(data, max_pixels)
        return PictureStructure(max(1, jpeg.num_scans), jpeg.num_scans == 1 and jpeg.is_sequential)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        check_gif(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        check_webp(data, max_pixels)
    elif data.startswith(_TIFF_STARTS):
        check_tiff(data)
    return PictureStructure()
