"""Draws samples. Equal arguments give equal samples; the splits share no seed, and held-out words and handwritten
digits never occur in training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

from PIL import Image

from vitrine_vlm.sample_models.tiny_vlm.data import canvas
from vitrine_vlm.sample_models.tiny_vlm.data.handwriting import describe_strip, draw_strip, strip_questions
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Kind, Question, Sample, Split
from vitrine_vlm.sample_models.tiny_vlm.data.shapes import NAMES, Shape, describe_shapes, draw_shapes, shape_questions
from vitrine_vlm.sample_models.tiny_vlm.data.texts import Texts, describe_texts, draw_texts, text_questions
from vitrine_vlm.sample_models.tiny_vlm.data.videos import clip_questions, film_ball

KINDS: tuple[Kind, ...] = get_args(Kind)
_ASK_DESCRIPTION = ("What is in this picture?", "Describe the picture.", "What do you see?")
_ORDINALS = ("first", "second", "third")
_MAX_SIDE_OF_SEVERAL = 320


@dataclass(frozen=True)
class _Scene:
    """One picture, its questions, and its description."""

    image: Image.Image
    description: str
    questions: tuple[Question, ...]
    shapes: tuple[Shape, ...] = ()
    texts: Texts | None = None
    digits: str | None = None


def draw_sample(split: Split, index: int) -> Sample:
    """Returns sample `index` of the split, of any kind."""
    rng = random.Random(f"{split} {index}")
    make: Callable[[random.Random, Split], Sample] = rng.choices(
        (_shapes_sample, _texts_sample, _strip_sample, _pictures_sample, _video_sample), (20, 46, 12, 15, 7)
    )[0]
    return make(rng, split)


def draw_question(split: Split, index: int) -> tuple[Sample, Question]:
    """Returns question `index` of the split with its sample; the kinds alternate, so that all are equally frequent."""
    kind = KINDS[index % len(KINDS)]
    rng = random.Random(f"{split} question {index}")
    while True:
        sample = _MAKERS[kind](rng, split)
        questions = [question for question in sample.questions if question.kind == kind]
        if questions:
            return sample, rng.choice(questions)


def _shapes_sample(rng: random.Random, split: Split) -> Sample:
    return _of_one(rng, _shapes_scene(rng))


def _texts_sample(rng: random.Random, split: Split) -> Sample:
    return _of_one(rng, _texts_scene(rng, split))


def _strip_sample(rng: random.Random, split: Split) -> Sample:
    return _of_one(rng, _strip_scene(rng, split))


def _video_sample(rng: random.Random, split: Split) -> Sample:
    clip, motion = film_ball(rng)
    return Sample((clip,), tuple(clip_questions(rng, motion)))


def _any_picture_sample(rng: random.Random, split: Split) -> Sample:
    return rng.choice((_shapes_sample, _shapes_sample, _texts_sample, _strip_sample))(rng, split)


def _pictures_sample(rng: random.Random, split: Split) -> Sample:
    """Returns two or three pictures with questions about all of them."""
    scenes = []
    for _ in range(rng.randint(2, 3)):
        what = rng.random()
        if what < 0.6:
            scenes.append(_shapes_scene(rng, _MAX_SIDE_OF_SEVERAL))
        elif what < 0.85:
            scenes.append(_texts_scene(rng, split, _MAX_SIDE_OF_SEVERAL))
        else:
            scenes.append(_strip_scene(rng, split, _MAX_SIDE_OF_SEVERAL))
    return Sample(tuple(scene.image for scene in scenes), tuple(_questions_about_several(rng, scenes)))


_MAKERS: dict[Kind, Callable[[random.Random, Split], Sample]] = {
    "color": _shapes_sample,
    "shape": _shapes_sample,
    "count": _shapes_sample,
    "position": _shapes_sample,
    "relation": _shapes_sample,
    "description": _any_picture_sample,
    "word": _texts_sample,
    "number": _texts_sample,
    "handwriting": _strip_sample,
    "pictures": _pictures_sample,
    "video": _video_sample,
}


def _of_one(rng: random.Random, scene: _Scene) -> Sample:
    asked = Question("description", rng.choice(_ASK_DESCRIPTION), scene.description)
    return Sample((scene.image,), (*scene.questions, asked))


def _shapes_scene(rng: random.Random, max_side: int = canvas.MAX_SIDE) -> _Scene:
    image, shapes = draw_shapes(rng, max_side)
    return _Scene(image, describe_shapes(shapes), tuple(shape_questions(rng, shapes)), shapes=shapes)


def _texts_scene(rng: random.Random, split: Split, max_side: int = canvas.MAX_SIDE) -> _Scene:
    image, texts = draw_texts(rng, split, max_side)
    return _Scene(image, describe_texts(texts), tuple(text_questions(rng, texts)), texts=texts)


def _strip_scene(rng: random.Random, split: Split, max_side: int = canvas.MAX_SIDE) -> _Scene:
    image, digits = draw_strip(rng, split, max_side)
    return _Scene(image, describe_strip(digits), tuple(strip_questions(rng, digits)), digits=digits)


def _questions_about_several(rng: random.Random, scenes: list[_Scene]) -> Iterator[Question]:
    yield Question("pictures", "How many pictures are there?", str(len(scenes)))
    for ordinal, scene in zip(_ORDINALS, scenes, strict=False):
        yield Question("pictures", f"What is in the {ordinal} picture?", scene.description)
        if scene.shapes:
            yield Question("pictures", f"How many shapes are in the {ordinal} picture?", str(len(scene.shapes)))
            shape = rng.choice(scene.shapes)
            if [each.name for each in scene.shapes].count(shape.name) == 1:
                yield Question("pictures", f"What color is the {shape.name} in the {ordinal} picture?", shape.color)
            if len(scene.shapes) == 1:
                yield Question("pictures", f"Which shape is in the {ordinal} picture?", shape.name)
        if scene.texts and scene.texts.word:
            yield Question("pictures", f"Which word is in the {ordinal} picture?", scene.texts.word)
        if scene.texts and scene.texts.number:
            yield Question("pictures", f"Which number is in the {ordinal} picture?", scene.texts.number)
        if scene.digits:
            yield Question("pictures", f"Which handwritten digits are in the {ordinal} picture?", scene.digits)
    name = rng.choice(NAMES)
    yield from _which(
        f"Which picture shows a {name}?", [name in {each.name for each in scene.shapes} for scene in scenes]
    )
    yield from _which("Which picture shows handwritten digits?", [scene.digits is not None for scene in scenes])
    yield from _which("Which picture shows a word?", [bool(scene.texts and scene.texts.word) for scene in scenes])


def _which(text: str, holds: list[bool]) -> Iterator[Question]:
    """Yields the question if exactly one picture is the answer."""
    if holds.count(True) == 1:
        yield Question("pictures", text, f"the {_ORDINALS[holds.index(True)]}")
