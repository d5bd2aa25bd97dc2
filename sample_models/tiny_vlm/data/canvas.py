"""Empty pictures of many sizes, and the wear of real ones: noise, gradients, JPEG."""

from __future__ import annotations

import io
import math
import random

import numpy as np
from PIL import Image

from vitrine_vlm.sample_models.tiny_vlm.data.colors import Rgb

MIN_SIDE, MAX_SIDE = 64, 512
_MAX_RATIO = 3.0


def size(
    rng: random.Random, min_width: int = MIN_SIDE, min_height: int = MIN_SIDE, max_side: int = MAX_SIDE
) -> tuple[int, int]:
    """Returns (width, height) in pixels, each log-uniform, neither more than three times the other."""
    width = _log_uniform(rng, min_width, max_side)
    low = max(min_height, math.ceil(width / _MAX_RATIO))
    high = min(max_side, int(width * _MAX_RATIO))
    return width, _log_uniform(rng, min(low, high), high)


def blank(rng: random.Random, size: tuple[int, int], color: Rgb) -> Image.Image:
    """Returns a plain picture, sometimes with a slight gradient."""
    if rng.random() < 0.85:
        return Image.new("RGB", size, color)
    end = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in color)
    ramp = Image.linear_gradient("L").rotate(90 * rng.randrange(4)).resize(size)
    return Image.composite(Image.new("RGB", size, end), Image.new("RGB", size, color), ramp)


def worn(rng: random.Random, image: Image.Image) -> Image.Image:
    """Returns the picture with artifacts of cameras and scanners: sometimes noise, sometimes JPEG compression."""
    if rng.random() < 0.12:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), (image.height, image.width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.12:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(file)
    return image


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
