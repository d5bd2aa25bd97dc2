"""Decodes images by Pillow: the size from the header first, the pixels later. No other file imports Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vitrine_vlm.encoder_service.decoding.file_length import is_truncated
from vitrine_vlm.encoder_service.decoding.media_decoder import Allocate, ImageHeader, Pixels
from vitrine_vlm.encoder_service.decoding.picture_structure import check_structure
from vitrine_vlm.errors import MediaError, MediaTooLarge, MediaTruncated, NotAnImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# Of ISO base media files that hold HEVC pictures, or any; AVIF's brands are decoded.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAX_XML_PROLOG = 2048
# Larger pictures are converted in strips: copies of a whole one in other modes would take several times its memory.
_STRIP_PIXELS = 2560 * 1024

# Pillow's own limit is a process-wide constant that may only warn: `max_pixels` below is checked instead.
Image.MAX_IMAGE_PIXELS = None


def open_image(data: bytes, max_pixels: int) -> ImageHeader:
    """Reads an image's header.

    Args:
        data: the encoded file; of an animation, the first frame is used.
        max_pixels: largest accepted width x height.

    Raises:
        NotAnImage: no format of FORMATS, or a damaged header.
        MediaTruncated: the file ends inside its header.
        MediaTooLarge: more than `max_pixels` pixels, or see `check_structure`.
    """
    try:
        structure = check_structure(data, max_pixels)
        image = _open(data)
        width, height = image.size
        _check_size(width, height, max_pixels)
        orientation = _orientation(image, data)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on hostile files
        raise _refusal(data, error) from error
    turned = orientation >= 5
    return ImageHeader(
        height=width if turned else height,
        width=height if turned else width,
        orientation=orientation,
        format=image.format or "",
        num_passes=structure.num_passes,
        # CMYK needs Pillow's conversion.
        is_plain_jpeg=structure.is_baseline and image.format == "JPEG" and image.mode in ("RGB", "L"),
    )


def decode_image(data: bytes, header: ImageHeader, allocate: Allocate) -> Pixels:
    """Decodes the pixels: [height, width, 3], uint8; upright, RGB, transparency on white.

    Args:
        allocate: returns the memory for them.

    Raises:
        MediaTruncated: the file ends before the pixels do.
        NotAnImage: the pixels can't be decoded, or have no defined range (32-bit and floating-point ones).
    """
    try:
        image = _open(data)
        image.load()
        pixels_HWC = allocate(header.height, header.width)
        stored_HWC = as_stored(pixels_HWC, header.orientation)
        num_rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, num_rows):
            bottom = min(top + num_rows, image.height)
            strip = image if num_rows >= image.height else image.crop((0, top, image.width, bottom))
            stored_HWC[top:bottom] = np.asarray(_to_rgb(strip))
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise _refusal(data, error) from error
    return pixels_HWC


def as_stored(upright_HWC: Pixels, orientation: int) -> Pixels:
    """A view of an upright picture in which rows and columns are as they are stored in the file."""
    flipped = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    stored_HWC = np.flip(upright_HWC, flipped) if flipped else upright_HWC
    return stored_HWC.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else stored_HWC


def _open(data: bytes) -> Image.Image:
    """Reads the header; a Pillow image keeps its pixels once it is loaded, so each use has one of its own."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _refusal(data: bytes, error: Exception) -> MediaTruncated | NotAnImage:
    if not data:
        return NotAnImage("the image file is empty")
    if "truncated" in str(error).lower() or isinstance(error, EOFError) or is_truncated(data):
        return MediaTruncated(f"the image file ends too early, after {len(data)} bytes: send the whole file")
    if isinstance(error, UnidentifiedImageError):
        name = _unsupported_format(data)
        what = f"a {name} file, which is not decoded here" if name else "no valid image"
        return NotAnImage(f"{len(data)} bytes that are {what}: send one of {', '.join(FORMATS)}")
    return NotAnImage(f"the image file is damaged: {type(error).__name__} while decoding")


def _unsupported_format(data: bytes) -> str | None:
    """The format by its first bytes, where it is a known one that is not in FORMATS."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC"
    if data.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG 2000"
    if data.startswith((b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")):
        return "JPEG XL"
    if data.startswith(b"%PDF-"):
        return "PDF"
    beginning = data[:_MAX_XML_PROLOG].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return (
        "SVG" if beginning.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in beginning else None
    )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaTooLarge(f"an image of {width}x{height} pixels: at most {max_pixels} are accepted, scale it down")
    if width < 1 or height < 1:
        raise NotAnImage(f"the image has {width}x{height} pixels")


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation that is still to be applied, 1 (upright) to 8; avoids decoding pixels."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    # PngImageFile.getexif decodes all pixels to look for EXIF behind them: it is called only where there may be some.
    exif = image.getexif() if image.format != "PNG" or b"eXIf" in data else Image.Image.getexif(image)
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return int(orientation) if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; transparency as in transformers 5.23, image_transforms.py `convert_to_rgb`: on white."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion to 8 bits clips instead of scaling
        grey = np.asarray(image)
        high_byte = (grey >> 8).astype(np.uint8)
        if (key := image.info.get("transparency")) is not None:
            high_byte[grey == key] = 255
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise NotAnImage(f"pixels of mode {image.mode} (32 bits) have no defined range: convert to 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
