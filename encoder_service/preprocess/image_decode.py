"""Decodes images by Pillow: the size from the header first, the pixels later. No other file imports Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from vitrine_vlm.encoder_service.decoding.file_length import is_truncated
from vitrine_vlm.encoder_service.decoding.picture_structure import check_structure
from vitrine_vlm.encoder_service.preprocess import nvjpeg
from vitrine_vlm.errors import MediaError, MediaTooLarge, MediaTruncated, NotAnImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# Of ISO base media files that hold HEVC pictures, or any; AVIF's brands are decoded.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAX_XML_PROLOG = 2048

# Pillow's own limit is a process-wide constant that may only warn: `max_pixels` below is checked instead.
Image.MAX_IMAGE_PIXELS = None

# The transposition that turns an image upright, by EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class EncodedImage:
    """An image whose header has been read.

    Args:
        data: the encoded file; of an animation, the first frame is used.
        max_pixels: largest accepted width x height.

    Raises:
        NotAnImage: no format of FORMATS, or a damaged header.
        MediaTruncated: the file ends inside its header.
        MediaTooLarge: more than `max_pixels` pixels, or see `check_structure`.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data = data
        try:
            self._structure = check_structure(data, max_pixels)
            image = self._open()
            width, height = image.size
            _check_size(width, height, max_pixels)
            self._orientation = _orientation(image, data)
        except MediaError:
            raise
        except Exception as error:  # decoders raise anything from struct.error to SyntaxError on hostile files
            raise self._refusal(error) from error
        self._format, self._mode = image.format, image.mode
        turned = self._orientation >= 5
        # Upright size, pixels.
        self.height, self.width = (width, height) if turned else (height, width)

    @property
    def suits_nvjpeg(self) -> bool:
        """Whether it is a complete baseline JPEG in colour or grey, and nvJPEG is there.

        CMYK needs Pillow's conversion, and a decoder of many scans has to be one that can be ended.
        """
        return (
            self._format == "JPEG"
            and self._structure.is_baseline
            and self._mode in ("RGB", "L")
            and nvjpeg.has_nvjpeg()
            and not is_truncated(self._data)
        )

    def decode(self, device: torch.device) -> torch.Tensor:
        """Decodes the pixels: [3, height, width], uint8, any strides, on `device`; upright, RGB, transparency on white.

        Any thread may call it, several at once and again, and none of the pixels stay in memory here.

        nvJPEG decodes a JPEG if `device` is a GPU and nvJPEG is installed; Pillow decodes everything else.

        Raises:
            MediaTruncated: the file ends before the pixels do.
            NotAnImage: the pixels can't be decoded, or have no defined range (32-bit and floating-point ones).
        """
        if device.type == "cuda" and self.suits_nvjpeg:
            try:
                return decode_batch([self], device)[0]
            except RuntimeError:
                pass  # Pillow decodes it, or raises the error that says what is wrong
        try:
            opened = self._open()
            opened.load()
            image = _to_rgb(opened)
            if self._orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[self._orientation])
        except NotAnImage:
            raise
        except Exception as error:
            raise self._refusal(error) from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)

    def _open(self) -> Image.Image:
        """Reads the header; a Pillow image keeps its pixels once it is loaded, so each use has one of its own."""
        return Image.open(io.BytesIO(self._data), formats=FORMATS)

    def _refusal(self, error: Exception) -> MediaTruncated | NotAnImage:
        if not self._data:
            return NotAnImage("the image file is empty")
        if "truncated" in str(error).lower() or isinstance(error, EOFError) or is_truncated(self._data):
            return MediaTruncated(f"the image file ends too early, after {len(self._data)} bytes: send the whole file")
        if isinstance(error, UnidentifiedImageError):
            name = _unsupported_format(self._data)
            what = f"a {name} file, which is not decoded here" if name else "no valid image"
            return NotAnImage(f"{len(self._data)} bytes that are {what}: send one of {', '.join(FORMATS)}")
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


def decode_batch(images: Sequence[EncodedImage], device: torch.device) -> list[torch.Tensor]:
    """Decodes several images that suit nvJPEG in one call; see `EncodedImage.decode`.

    Raises:
        RuntimeError: nvJPEG cannot decode one of them.
    """
    decoded = nvjpeg.decode([image._data for image in images], device)
    return [_upright(pixels, image._orientation) for pixels, image in zip(decoded, images, strict=True)]


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
    return orientation if orientation in _UPRIGHT else 1


def _upright(pixels_CHW: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turns a tensor upright, as `_UPRIGHT` does a Pillow image."""
    if orientation in (5, 6, 7, 8):
        pixels_CHW = pixels_CHW.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels_CHW.flip(flipped) if flipped else pixels_CHW


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
    return image.convert("RGB")
