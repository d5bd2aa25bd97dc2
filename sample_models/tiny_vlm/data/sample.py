"""The generator's results: media, and questions about them with their only right answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Split = Literal["train", "heldout"]
Kind = Literal[
    "color",
    "shape",
    "count",
    "position",
    "relation",
    "description",
    "word",
    "number",
    "handwriting",
    "pictures",
    "video",
]


@dataclass(frozen=True)
class Question:
    """A question with its only right answer, letter for letter."""

    kind: Kind
    text: str
    answer: str


@dataclass(frozen=True)
class Clip:
    """A short video: `frame(index)` draws frame `index` of `num_frames`, shown at `fps` frames per second."""

    num_frames: int
    fps: int
    size: tuple[int, int]
    frame: Callable[[int], Image.Image]


@dataclass(frozen=True)
class Sample:
    """Either one to three pictures or one clip, and every question drawn about them."""

    media: tuple[Image.Image | Clip, ...]
    questions: tuple[Question, ...]


def sentence(parts: list[str]) -> str:
    """Returns the parts as one sentence: "A red circle, a blue square and a green star." """
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return text[0].upper() + text[1:] + "."


def with_article(phrase: str) -> str:
    return f"{'an' if phrase.startswith('o') else 'a'} {phrase}"
