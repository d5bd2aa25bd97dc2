"""A printed word, a printed number, or one above the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vitrine_vlm.sample_models.tiny_vlm.data import canvas, colors, fonts
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Question, Split, sentence
from vitrine_vlm.sample_models.tiny_vlm.data.words import word

MAX_WORD_LENGTH, MAX_NUMBER_LENGTH = 8, 5
_MIN_FONT_SIZE, _MAX_FONT_SIZE = 15, 96
_MIN_LETTER_WIDTH = 10  # pixels, at the smallest font size

_READ = ("What does it say?", "What is written here?", "Read the text.")


@dataclass(frozen=True)
class Texts:
    """The texts of a picture and their colours; None for a missing one."""

    word: str | None
    word_color: str
    number: str | None


def draw_texts(rng: random.Random, split: Split, max_side: int = canvas.MAX_SIDE) -> tuple[Image.Image, Texts]:
    """Returns a picture of a word, a number, or both."""
    both = rng.random() < 0.25
    has_word = both or rng.random() < 0.65
    has_number = both or not has_word
    size = canvas.size(rng, min_height=96 if both else canvas.MIN_SIDE, max_side=max_side)
    max_length = (size[0] - 4) // _MIN_LETTER_WIDTH
    ground = colors.background(rng)
    color = colors.readable_color(rng, ground)
    printed_word = word(rng, split, min(MAX_WORD_LENGTH, max_length)) if has_word else None
    printed_number = _number(rng, min(MAX_NUMBER_LENGTH, max_length)) if has_number else None
    image = canvas.blank(rng, size, ground)
    lines = [text for text in (printed_word, printed_number) if text is not None]
    if both and rng.random() < 0.5:
        lines.reverse()
    height = size[1] // len(lines)
    for index, line in enumerate(lines):
        _print(rng, image, line, (0, index * height, size[0], (index + 1) * height), colors.shade(rng, color))
    return canvas.worn(rng, image), Texts(printed_word, color, printed_number)


def _print(
    rng: random.Random, image: Image.Image, text: str, box: tuple[int, int, int, int], color: colors.Rgb
) -> None:
    """Prints `text` somewhere inside `box`, in any font and at any size that fits."""
    left, top, right, bottom = box
    name = rng.choice(fonts.NAMES)
    # The size of a text is proportional to the font size, so one measurement gives the largest size.
    x0, y0, x1, y1 = fonts.font(name, 64).getbbox(text)
    largest = int(64 * min((right - left - 4) / (x1 - x0), (bottom - top - 4) / (y1 - y0)))
    largest = max(10, min(_MAX_FONT_SIZE, largest))
    font = fonts.font(name, rng.randint(min(_MIN_FONT_SIZE, largest), largest))
    x0, y0, x1, y1 = font.getbbox(text)
    x = left + rng.uniform(0, max(0.0, right - left - (x1 - x0))) - x0
    y = top + rng.uniform(0, max(0.0, bottom - top - (y1 - y0))) - y0
    ImageDraw.Draw(image).text((x, y), text, fill=color, font=font)


def _number(rng: random.Random, max_length: int) -> str:
    first = rng.choice("123456789")
    return first + "".join(rng.choices("0123456789", k=rng.randint(0, max_length - 1)))


def text_questions(rng: random.Random, texts: Texts) -> Iterator[Question]:
    """Yields questions about one picture of texts."""
    if texts.word is not None:
        yield Question(
            "word", rng.choice(("Which word is printed here?", "What word does the picture say?")), texts.word
        )
        yield Question("color", "What color is the word?", texts.word_color)
    if texts.number is not None:
        yield Question(
            "number", rng.choice(("Which number is printed here?", "What number does the picture say?")), texts.number
        )
    if texts.number is None and texts.word is not None:
        yield Question("word", rng.choice(_READ), texts.word)
    if texts.word is None and texts.number is not None:
        yield Question("number", rng.choice(_READ), texts.number)


def describe_texts(texts: Texts) -> str:
    """Returns a description, such as: The word river and the number 42."""
    parts = [f"the word {texts.word}"] if texts.word is not None else []
    parts += [f"the number {texts.number}"] if texts.number is not None else []
    return sentence(parts)
