"""Samples are reproducible, the splits share nothing that could be learnt by heart, and the answers are true."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from vitrine_vlm.sample_models.tiny_vlm.data import words
from vitrine_vlm.sample_models.tiny_vlm.data.canvas import MAX_SIDE, MIN_SIDE
from vitrine_vlm.sample_models.tiny_vlm.data.colors import COLORS
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS, draw_question, draw_sample
from vitrine_vlm.sample_models.tiny_vlm.data.handwriting import _digits
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Clip, Kind, Question, Sample

NUM_SAMPLES = 300
COLOR_DISTANCE = 45.0  # of a pixel from its colour's anchor: jitter, noise, gradient and JPEG


@pytest.fixture(scope="module")
def train() -> list[Sample]:
    return [draw_sample("train", index) for index in range(NUM_SAMPLES)]


def pictures(sample: Sample) -> Iterator[Image.Image]:
    for media in sample.media:
        yield media.frame(0) if isinstance(media, Clip) else media


def held_out(kind: Kind, count: int) -> Iterator[tuple[Sample, Question]]:
    """The first `count` held-out questions of a kind."""
    for turn in range(count):
        yield draw_question("heldout", KINDS.index(kind) + turn * len(KINDS))


def distance(pixels: np.ndarray, color: str) -> np.ndarray:
    """Of every pixel from the nearest anchor of `color`."""
    anchors = np.array(COLORS[color], dtype=float)
    nearest: np.ndarray = np.linalg.norm(pixels[..., None, :].astype(float) - anchors, axis=-1).min(-1)
    return nearest


def test_equal_arguments_give_equal_samples(train: list[Sample]) -> None:
    for index in range(40):
        again = draw_sample("train", index)
        assert again.questions == train[index].questions
        for one, other in zip(pictures(again), pictures(train[index]), strict=True):
            assert one.tobytes() == other.tobytes()


def test_splits_draw_different_samples(train: list[Sample]) -> None:
    for index in range(40):
        one, other = next(pictures(draw_sample("heldout", index))), next(pictures(train[index]))
        assert one.tobytes() != other.tobytes()


def test_held_out_words_and_digits_never_occur_in_training(train: list[Sample]) -> None:
    secret = set(words._HELD_OUT)
    assert len(secret) > 50
    seen = set(words._TRAIN)
    for sample in train:
        seen |= {question.answer.lower() for question in sample.questions if question.kind == "word"}
    assert not seen & secret
    asked = {question.answer.lower() for _, question in held_out("word", 40)}
    assert asked & secret, "half of the held-out questions are about held-out words"
    for of_one_train, of_one_held_out in zip(_digits("train"), _digits("heldout"), strict=True):
        assert of_one_held_out
        assert not {each.tobytes() for each in of_one_train} & {each.tobytes() for each in of_one_held_out}


def test_media_are_as_promised(train: list[Sample]) -> None:
    numbers = {len(sample.media) for sample in train}
    assert numbers == {1, 2, 3}
    assert any(isinstance(sample.media[0], Clip) for sample in train)
    for sample in train:
        for picture in pictures(sample):
            assert MIN_SIDE <= min(picture.size) <= max(picture.size) <= MAX_SIDE


def test_kinds_take_turns() -> None:
    for index, kind in enumerate(KINDS):
        assert draw_question("heldout", index)[1].kind == kind


def test_no_question_has_two_answers(train: list[Sample]) -> None:
    for sample in train:
        answers: dict[str, str] = {}
        for question in sample.questions:
            assert answers.setdefault(question.text, question.answer) == question.answer, question.text


def test_shapes_have_the_colour_they_are_said_to_have() -> None:
    checked = 0
    for sample, question in held_out("color", 60):
        if question.answer not in COLORS:
            continue
        pixels = np.asarray(next(pictures(sample)).convert("RGB"))
        assert (distance(pixels, question.answer) < COLOR_DISTANCE).mean() > 0.002, question
        checked += 1
    assert checked > 50


def test_the_ball_moves_as_it_is_said_to() -> None:
    steps = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    seen = set()
    for sample, question in held_out("video", 60):
        described = re.fullmatch(r"An? (\w+) ball moves (\w+)\.", question.answer)
        if described is None:
            continue
        clip = sample.media[0]
        assert isinstance(clip, Clip)
        # Only the ball differs between first and last frame.
        first, last = (np.asarray(clip.frame(index)).astype(int) for index in (0, clip.num_frames - 1))
        changed = np.abs(first - last).sum(-1) > 60
        at = [
            np.argwhere(changed & (distance(frame, described[1]) < COLOR_DISTANCE)).mean(0)[::-1]
            for frame in (first, last)
        ]
        x, y = at[1] - at[0]
        across = "left" if x < 0 else "right"
        assert described[2] == (across if abs(x) > abs(y) else "up" if y < 0 else "down")
        seen.add(described[2])
    assert seen == set(steps)


def test_the_count_of_pictures_is_theirs() -> None:
    checked = 0
    for sample, question in held_out("pictures", 120):
        if question.text == "How many pictures are there?":
            assert question.answer == str(len(sample.media))
            checked += 1
    assert checked > 5
