"""Pictures for measurements: as large as photographs once compressed, and all different."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def parse_size(text: str) -> tuple[int, int]:
    """Returns (width, height) of WIDTHxHEIGHT."""
    width, height = map(int, text.split("x"))
    return width, height


def show_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def random_jpegs(num_pictures: int, size: tuple[int, int], seed: int = 0) -> list[bytes]:
    """Returns JPEG files of `size`, (width, height): one picture with detail at every scale, shifted differently."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size[1], size[0], 3), dtype=np.float32)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / cells**0.5
    pixels = (image * (255 / image.max())).astype(np.uint8)
    shifts = rng.choice(size[0] * size[1], num_pictures, replace=False)
    return [_jpeg(np.roll(pixels, divmod(int(shift), size[0]), axis=(0, 1))) for shift in shifts]


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
