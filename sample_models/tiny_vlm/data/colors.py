"""Named colours with random variation, and backgrounds on which they are visible."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Rgb = tuple[int, int, int]

# Several anchors per name, including the plain CSS colour; every pixel colour is within _JITTER of one.
COLORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (205, 30, 40), (225, 45, 30)),
    "orange": ((255, 165, 0), (245, 130, 25)),
    "yellow": ((255, 255, 0), (245, 220, 45)),
    "green": ((0, 128, 0), (45, 170, 70), (0, 200, 20)),
    "blue": ((0, 0, 255), (35, 85, 205), (25, 60, 150)),
    "purple": ((128, 0, 128), (140, 60, 190)),
    "pink": ((255, 105, 180), (250, 150, 195)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (240, 240, 240)),
}
_BACKGROUNDS: tuple[Rgb, ...] = (
    (255, 255, 255),
    (255, 255, 255),
    (244, 240, 228),
    (222, 226, 232),
    (190, 215, 235),
    (200, 225, 200),
    (150, 150, 150),
    (70, 70, 80),
    (35, 50, 70),
    (0, 0, 0),
)
_JITTER = 10
_MIN_DISTANCE = 110
_MIN_CONTRAST = 55


def background(rng: random.Random) -> Rgb:
    return _jittered(rng, rng.choice(_BACKGROUNDS))


def visible_colors(rng: random.Random, on: Rgb, count: int) -> list[str]:
    """Returns `count` names, possibly repeated, all clearly different from the background `on`."""
    names = [name for name, anchors in COLORS.items() if all(_distance(each, on) > _MIN_DISTANCE for each in anchors)]
    return rng.choices(names, k=count)


def readable_color(rng: random.Random, on: Rgb) -> str:
    """Returns a name that is readable on the background `on`: lighter or darker, not only of another hue."""
    return rng.choice(
        [
            name
            for name, anchors in COLORS.items()
            if all(abs(_luminance(each) - _luminance(on)) > _MIN_CONTRAST for each in anchors)
        ]
    )


def shade(rng: random.Random, name: str) -> Rgb:
    """Returns a pixel colour of this name."""
    return _jittered(rng, rng.choice(COLORS[name]))


def _jittered(rng: random.Random, rgb: Rgb) -> Rgb:
    red, green, blue = (min(255, max(0, value + rng.randint(-_JITTER, _JITTER))) for value in rgb)
    return red, green, blue


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    return math.dist(one, other)


def _luminance(rgb: Rgb) -> float:
    """0 to 255, by the weights of ITU-R BT.601."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
