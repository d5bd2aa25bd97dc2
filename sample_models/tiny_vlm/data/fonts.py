"""Fonts of Pillow and matplotlib, so that none need be installed on the system."""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
from PIL import ImageFont

_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NAMES = (
    "",  # Pillow's own, Aileron
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmss10",
    "cmtt10",
)


@functools.lru_cache(maxsize=4096)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns font `name` of NAMES at `size` pixels."""
    if name:
        return ImageFont.truetype(_FOLDER / f"{name}.ttf", size)
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)  # Pillow without FreeType has only a bitmap
    return default
