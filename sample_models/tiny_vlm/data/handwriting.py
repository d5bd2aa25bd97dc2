"""Strips of handwritten digits: the UCI digits that scikit-learn ships (`sklearn.datasets.load_digits`, 8x8 pixels)."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from vitrine_vlm.sample_models.tiny_vlm.data import canvas, colors
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Question, Split, sentence

MAX_DIGITS = 5
_HELD_OUT_EVERY = 10
_MIN_SIDE, _MAX_SIDE = 26, 110
_ASK_DIGITS = ("Which digits are written here?", "What are the handwritten digits?", "Read the digits.")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


@functools.cache
def _digits(split: Split) -> list[list[npt.NDArray[np.uint8]]]:
    """Returns the 8x8 pictures (0 to 240, ink bright) of each digit; every tenth one of a digit is held out."""
    data = load_digits()
    pictures: list[list[npt.NDArray[np.uint8]]] = [[] for _ in range(10)]
    for pixels, digit in zip(data.images, data.target, strict=True):
        pictures[digit].append((pixels * 15).astype(np.uint8))
    return [
        [each for index, each in enumerate(of_one) if (index % _HELD_OUT_EVERY == 0) == (split == "heldout")]
        for of_one in pictures
    ]


def draw_strip(rng: random.Random, split: Split, max_side: int = canvas.MAX_SIDE) -> tuple[Image.Image, str]:
    """Returns a picture of two to five digits in a row, and the digits."""
    width, height = canvas.size(rng, max_side=max_side)
    count = rng.randint(2, min(MAX_DIGITS, width // (_MIN_SIDE + 2)))
    ground = colors.background(rng)
    color = colors.shade(rng, colors.readable_color(rng, ground))
    image = canvas.blank(rng, (width, height), ground)
    largest = min(_MAX_SIDE, width // count, height)
    side = rng.randint(min(_MIN_SIDE, largest), largest)
    gap = rng.uniform(0, min(0.6 * side, (width - count * side) / count))
    left = rng.uniform(0, width - count * side - (count - 1) * gap)
    top = rng.uniform(0, height - side)
    text = "".join(rng.choices("0123456789", k=count))
    for index, digit in enumerate(text):
        mask = _written(rng, rng.choice(_digits(split)[int(digit)]), side)
        shift = rng.uniform(-0.08, 0.08) * side
        image.paste(color, (round(left + index * (side + gap)), round(min(height - side, max(0.0, top + shift)))), mask)
    return canvas.worn(rng, image), text


def _written(rng: random.Random, pixels: npt.NDArray[np.uint8], side: int) -> Image.Image:
    """Returns a digit as a mask of side x side pixels, slightly rotated, slanted and stretched."""
    slant, turn = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
    across, down = 8 / side * rng.uniform(0.95, 1.1), 8 / side * rng.uniform(0.95, 1.1)
    a, b, d, e = across, across * (slant - turn), down * turn, down
    middle = side / 2
    affine = (a, b, 4 - (a + b) * middle, d, e, 4 - (d + e) * middle)
    strong = Image.fromarray(pixels).point(lambda value: min(255, int(value * 1.3)))
    return strong.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def strip_questions(rng: random.Random, digits: str) -> Iterator[Question]:
    """Yields questions about one strip."""
    yield Question("handwriting", rng.choice(_ASK_DIGITS), digits)
    index = rng.randrange(len(digits))
    ordinal = "last" if index == len(digits) - 1 and rng.random() < 0.5 else _ORDINALS[index]
    yield Question("handwriting", f"What is the {ordinal} handwritten digit?", digits[index])
    yield Question("count", "How many handwritten digits are there?", str(len(digits)))


def describe_strip(digits: str) -> str:
    return sentence([f"the handwritten digits {digits}"])
